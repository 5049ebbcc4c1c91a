"""Test whether a model can be trained exactly, by running it on random images."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..common.generators import drawn_from, generator_states, seed_generators
from ..common.process_state import changes, snapshot
from ..config import MNIST_SHAPE, ImageShape
from ..errors import UsageError
from .factory import shape_hint

_BATCH_STATISTICS = "batch statistics cannot be trained exactly, use per-sample norms"
_STATE = "what a pass leaves for the next one would depend on the number of processes"
_HIDDEN_STATE = (
    "it keeps state between passes (a counter, an average in a plain attribute) or draws random numbers "
    "from a generator of its own"
)


@dataclass(frozen=True)
class ModelProperties:
    """The properties of a model that `inspect` measures."""

    parameters: int
    """Number of trained parameters."""
    draws_random_numbers: bool
    unused: tuple[str, ...]
    """Names of the parameters that the logits do not depend on."""
    draws_from: tuple[str, ...] = ()
    """The global generators from which it draws random numbers: "torch", "NumPy", "Python"."""
    image_shape: ImageShape = MNIST_SHAPE
    """The shape of the images with which it was run."""


@torch.no_grad()
def inspect(
    model: nn.Module, name: str, classes: int, device: torch.device, shape: ImageShape = MNIST_SHAPE
) -> ModelProperties:
    """Run a model on random images of a shape and return its properties.

    Raises `UsageError` if it cannot be trained exactly. This tests the model's behaviour, not the types of
    its layers. So it also finds batch statistics or functional dropout in a user's own code.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    trial, settings = _Trial(model, name, device, shape), snapshot()
    if not trained:
        trial.refuse("it has no parameters to train")
    for key, parameter in trained.items():
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            trial.refuse(f"its parameter {key} is {dtype}: trained parameters must be float32")
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            trial.refuse(
                f"its parameter {key} has a hook of register_post_accumulate_grad_hook, which nothing here "
                "would call: use register_hook"
            )

    def differentiate() -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            total = trial.logits().float().sum()
            if not total.requires_grad:
                trial.refuse("its logits do not depend on its parameters")
            try:
                return torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            except (Exception, SystemExit) as error:
                trial.refuse(f"its backward pass fails: {type(error).__name__}: {error}")

    trial.test_training(classes)
    trial.test_evaluation()
    model.train()
    draws = trial.drawn_from(differentiate)
    gradients = dict(zip(trained, differentiate(), strict=True))
    unused = tuple(key for key, gradient in gradients.items() if gradient is None)
    for key, gradient in gradients.items():
        if gradient is not None and gradient.layout != torch.strided:
            trial.refuse(f"the gradient of its parameter {key} is sparse: make its layer with sparse=False")
    if changed := changes(settings):
        trial.refuse(
            f"its forward pass changes torch's {changed}, on which results depend: remove that call"
        )
    return ModelProperties(sum(p.numel() for p in trained.values()), bool(draws), unused, draws, shape)


class _Trial:
    """A model under test. Each pass is over two random images, `(2, *shape)`, by default the same ones.

    Its methods raise `UsageError`.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device, shape: ImageShape) -> None:
        self._model, self._name, self._device, self._shape = model, name, device, shape
        generator = torch.Generator().manual_seed(0)
        first, second, third = (torch.randn(1, *shape, generator=generator) for _ in range(3))
        self._images = torch.cat((first, second)).to(device)
        self._other_images = torch.cat((first, third)).to(device)

    def refuse(self, problem: str) -> NoReturn:
        raise UsageError(f"--model {self._name}: {problem}")

    def logits(self, images: Tensor | None = None) -> Tensor:
        """Make a pass, in which random numbers have always the same key."""
        seed_generators("inspect")
        images = self._images.clone() if images is None else images
        try:
            return self._model(images)
        except (Exception, SystemExit) as error:
            self.refuse(
                f"it fails on images {tuple(images.shape)}: {error}{shape_hint(self._name, self._shape)}"
            )

    def _state_after(self, images: Tensor) -> dict[str, Any]:
        """Return the states of the global generators after a pass over these images."""
        self.logits(images.clone())
        return generator_states(self._device)

    def drawn_from(self, compute: Callable[[], object]) -> tuple[str, ...]:
        """Return the names of the global generators from which `compute` draws."""
        draws = drawn_from(compute, self._device, "inspect")
        if draws is None:
            self.refuse(
                "how many random numbers it draws differs from call to call: another thread draws from the "
                "same generators, or the model keeps a state of its own"
            )
        return draws

    def test_training(self, classes: int) -> None:
        """Test passes in training mode."""
        model, refuse = self._model, self.refuse
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        frozen = [key for key, module in model.named_modules() if model.training and not module.training]
        model.train()
        logits = self.logits()
        if not isinstance(logits, Tensor):
            refuse(f"it returns a {type(logits).__name__}, not a tensor of logits")
        if logits.shape != (2, classes):
            shapes = f"{tuple(logits.shape)} for 2 images, not (2, {classes})"
            refuse(f"it returns shape {shapes}: the data has {classes} classes")
        changed = [key for key, value in model.named_buffers() if not torch.equal(value, buffers[key])]
        if changed:
            refuse(_why_buffers_change(model, changed[0], frozen))
        unchanged = equal(logits, self.logits())  # before more passes, after which a state may have settled
        tries = 3 if self.drawn_from(self.logits) else 0  # another thread may draw from the same generators
        if not (unchanged or any(equal(self.logits(), self.logits()) for _ in range(tries))):
            refuse(f"it gives other logits when a pass is repeated; {_HIDDEN_STATE}")
        # Kernels may round differently, for instance if the model sorts its images.
        tolerance = 1e-5 * float(logits.abs().nan_to_num().max())
        if not any(
            torch.allclose(
                self.logits()[0], self.logits(self._other_images)[0], rtol=0, atol=tolerance, equal_nan=True
            )
            for _ in range(max(1, tries))
        ):
            if tries and self._state_after(self._images) != self._state_after(self._other_images):
                refuse(
                    "how many random numbers it draws depends on what the images show: draw as many for "
                    "every image"
                )
            refuse(f"one image's logits depend on the others in its batch; {_BATCH_STATISTICS}")

    def test_evaluation(self) -> None:
        """Test passes in evaluation mode."""
        self._model.eval()
        images = self._images.clone()
        unchanged = equal(self.logits(images), self.logits())
        if not torch.equal(images, self._images):
            self.refuse("it changes its images in place: let it begin with images.clone()")
        if self.drawn_from(self.logits):
            self.refuse("it draws random numbers in evaluation")
        if not unchanged:
            self.refuse(f"it gives other logits when a pass is repeated in evaluation; {_HIDDEN_STATE}")


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same values; NaN is equal to NaN."""
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _why_buffers_change(model: nn.Module, key: str, frozen: Collection[str]) -> str:
    """Say what is wrong if buffer `key` changes; `frozen` modules had been set to evaluation."""
    name = key.rpartition(".")[0]
    problem = f"its buffer {key} changes in the forward pass"
    if not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm):
        return f"{problem}; {_STATE} (as a counter, a moving average or spectral norm does)"
    if name in frozen:
        return f"{problem}; train() has ended the evaluation mode of {name}: override train() to keep it"
    return f"{problem}; {_BATCH_STATISTICS}"
