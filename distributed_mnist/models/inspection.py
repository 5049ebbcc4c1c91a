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
from .running_statistics import RunningStatistics, neutralised, statistics_layers

_BATCH_STATISTICS = "only torch's layers BatchNorm1d to BatchNorm3d may do that, or use per-sample norms"
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
    statistics_layers: tuple[str, ...] = ()
    """Names of the layers that take statistics over a shard, see `running_statistics`."""
    min_images: int = 1
    """The fewest images with which it can make a pass in training."""


@torch.no_grad()
def inspect(
    model: nn.Module, name: str, classes: int, device: torch.device, shape: ImageShape = MNIST_SHAPE
) -> ModelProperties:
    """Run a model on random images of a shape and return its properties.

    Raises `UsageError` if it cannot be trained exactly. This tests the model's behaviour, not the types of
    its layers. So it also finds batch statistics or functional dropout in a user's own code.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    frozen = [key for key, module in model.named_modules() if model.training and not module.training]
    model.train()
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
        with torch.enable_grad(), trial.statistics.unchanged():  # a backward pass may change them too
            total = trial.run_pass().float().sum()
            if not total.requires_grad:
                trial.refuse("its logits do not depend on its parameters")
            try:
                return torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            except (Exception, SystemExit) as error:
                trial.refuse(f"its backward pass fails: {type(error).__name__}: {error}")

    trial.test_layers(frozen)
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
    return ModelProperties(
        parameters=sum(p.numel() for p in trained.values()),
        draws_random_numbers=bool(draws),
        unused=unused,
        draws_from=draws,
        image_shape=shape,
        statistics_layers=tuple(trial.layers),
        min_images=1 if trial.accepts_one_image() else 2,
    )


class _Trial:
    """A model under test, in training mode at first.

    Each pass is over two random images, `(2, *shape)`, by default the same ones. Its methods raise
    `UsageError`.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device, shape: ImageShape) -> None:
        self._model, self._name, self._device, self._shape = model, name, device, shape
        self.layers, self.statistics = statistics_layers(model), RunningStatistics(model)
        generator = torch.Generator().manual_seed(0)
        first, second, third = (torch.randn(1, *shape, generator=generator) for _ in range(3))
        self._images = torch.cat((first, second)).to(device)
        self._other_images = torch.cat((first, third)).to(device)

    def refuse(self, problem: str) -> NoReturn:
        raise UsageError(f"--model {self._name}: {problem}")

    def logits(self, images: Tensor | None = None) -> Tensor:
        """Make a pass that changes no running statistics."""
        with self.statistics.unchanged():
            return self.run_pass(images)

    def run_pass(self, images: Tensor | None = None) -> Tensor:
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

    def test_layers(self, frozen: Collection[str]) -> None:
        """Test the layers that take batch statistics; `frozen` modules had been set to evaluation."""
        for key, layer in self.layers.items():
            if key in frozen and layer.training:
                self.refuse(f"train() has ended the evaluation mode of {key}: override train() to keep it")
            if isinstance(layer, nn.SyncBatchNorm):
                self.refuse(
                    f"its layer {key} is a SyncBatchNorm, whose statistics would depend on the number of "
                    "processes: use BatchNorm1d to BatchNorm3d, whose statistics are those of a shard"
                )

    def accepts_one_image(self) -> bool:
        """Return whether a pass over one image works, which batch norm of single numbers refuses."""
        try:
            with self.statistics.unchanged():
                self._model(self._images[:1].clone())
        except (Exception, SystemExit):
            return False
        return True

    def test_training(self, classes: int) -> None:
        """Test passes in training mode."""
        model, refuse = self._model, self.refuse
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        logits = self.logits()
        if not isinstance(logits, Tensor):
            refuse(f"it returns a {type(logits).__name__}, not a tensor of logits")
        if logits.shape != (2, classes):
            shapes = f"{tuple(logits.shape)} for 2 images, not (2, {classes})"
            refuse(f"it returns shape {shapes}: the data has {classes} classes")
        changed = [key for key, value in model.named_buffers() if not torch.equal(value, buffers[key])]
        if changed:
            refuse(
                f"its buffer {changed[0]} changes in the forward pass; {_STATE} (as a counter, a moving "
                "average or spectral norm does)"
            )
        unchanged = equal(logits, self.logits())  # before more passes, after which a state may have settled
        tries = 3 if self.drawn_from(self.logits) else 0  # another thread may draw from the same generators
        if not (unchanged or any(equal(self.logits(), self.logits()) for _ in range(tries))):
            refuse(f"it gives other logits when a pass is repeated; {_HIDDEN_STATE}")
        with neutralised(model):
            mixes = not any(self._first_is_unchanged() for _ in range(max(1, tries)))
        if mixes:
            if tries and self._state_after(self._images) != self._state_after(self._other_images):
                refuse(
                    "how many random numbers it draws depends on what the images show: draw as many for "
                    "every image"
                )
            refuse(f"one image's logits depend on the others in its batch; {_BATCH_STATISTICS}")

    def _first_is_unchanged(self) -> bool:
        """Return whether the first image has the same logits beside another second one."""
        logits, others = self.logits(), self.logits(self._other_images)
        # Kernels may round differently, for instance if the model sorts its images.
        tolerance = 1e-5 * float(logits.abs().nan_to_num().max())
        return torch.allclose(logits[0], others[0], rtol=0, atol=tolerance, equal_nan=True)

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
