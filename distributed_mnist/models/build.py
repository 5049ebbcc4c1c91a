"""Build a model from its name, test whether it can be trained exactly, and run it.

A model is one of `zoo.MODELS` or a user's own factory, named `package.module:factory`.
"""

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..common.random_keys import torch_seed
from ..common.suggest import unknown
from ..config import Precision, Recipe
from ..errors import UsageError
from .zoo import IMAGE_SHAPE, MODELS

_BATCH_STATISTICS = "batch statistics cannot be trained exactly, use per-sample norms"
_STATE = "what a pass leaves for the next one would depend on the number of processes"
_HIDDEN_STATE = (
    "it keeps state between passes (a counter, an average in a plain attribute) or draws random numbers "
    "from a generator other than torch's"
)


@dataclass(frozen=True)
class ModelProperties:
    """The properties of a model that `inspect` measures."""

    parameters: int
    """Number of trained parameters."""
    draws_random_numbers: bool
    unused: tuple[str, ...]
    """Names of the parameters that the logits do not depend on."""


def make_model(recipe: Recipe, classes: int, device: torch.device) -> tuple[nn.Module, ModelProperties]:
    """Build a recipe's model on a device. Raises `UsageError` if it cannot be trained exactly."""
    model = place(build(recipe.model, classes, recipe.seed), device)
    return model, inspect(model, recipe.model, classes, device)


def build(name: str, classes: int, seed: int) -> nn.Module:
    """Build a model on the CPU. Its initial weights depend on `seed` alone.

    `name` is one of `MODELS` or `package.module:factory`, where `factory(classes)` returns a module.
    Raises `UsageError` if there is no such factory or if it fails.
    """
    factory = find_factory(name)
    torch.manual_seed(torch_seed("init", seed))
    try:
        with _current_folder_last():
            model = factory(classes)
    except Exception as error:
        raise UsageError(f"--model {name}: its factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model {name}: the factory returned a {type(model).__name__}, not a torch module"
        )
    if _uninitialised(model):
        if (problem := _failure(model, torch.device("cpu"))) is not None:
            raise UsageError(f"--model {name}: it fails on images {(2, *IMAGE_SHAPE)}: {problem}")
        if lazy := _uninitialised(model):
            raise UsageError(f"--model {name}: its {lazy[0]} gets no shape, because no pass uses its layer")
    return model


def _uninitialised(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers of lazy layers that have made no pass yet."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device and its convolutions' weights to channels-last layout.

    On CPU this layout is twice as fast. It decides which kernels run, and so the last bits. Therefore all
    code that runs a model must use this function. A model that fails with this layout, because it views a
    convolution's output as rows, keeps the contiguous one.
    """
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    has_layout = any(p.ndim == 4 for p in model.parameters())
    if has_layout and _failure(model, device) is not None:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if _failure(model, device) is not None:  # it has another reason
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _failure(model: nn.Module, device: torch.device) -> Exception | None:
    """Run a model on two images, in evaluation and in training; return its exception, or None.

    The images are always the same. Modes and buffers are restored, and torch's generators too.
    """
    images = torch.randn(2, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    on_cpu = device.type == "cpu"
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(
                [] if on_cpu else [device], device_type="cuda" if on_cpu else device.type
            ),
        ):
            for training in (False, True):
                model.train(training)(images.clone())
    except Exception as error:
        return error
    finally:
        for module, training in modes:
            module.training = training
        for buffer, value in buffers:
            buffer.copy_(value)
    return None


@contextlib.contextmanager
def temporary_model(name: str, factory: Callable[[int], Any]) -> Iterator[None]:
    """Make `name` a model inside this context, for a factory that cannot be imported."""
    before = dict(MODELS)
    MODELS[name] = factory
    try:
        yield
    finally:
        MODELS.clear()
        MODELS.update(before)


def find_factory(name: str) -> Callable[[int], Any]:
    """Return the function that makes models of this name. Raises `UsageError` if there is none."""
    if name in MODELS:
        return _function(name, MODELS[name])
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(unknown("model", name, MODELS, ", or package.module:factory"))
    try:
        with _current_folder_last():
            factory: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UsageError(
            f"--model {name}: {type(error).__name__}: {error}{_other_module(module_name)}"
        ) from error
    if not callable(factory):
        raise UsageError(f"--model {name}: {attribute} is not callable")
    return _function(name, factory)


def _function(name: str, factory: Callable[[int], Any]) -> Callable[[int], Any]:
    """Return the factory, unless it is a module. `build` checks what it returns."""
    if isinstance(factory, nn.Module):
        raise UsageError(
            f"--model {name}: this is a {type(factory).__name__} itself: give a function of the number of "
            "classes that returns one"
        )
    return factory


@contextlib.contextmanager
def _current_folder_last() -> Iterator[None]:
    """Let a user's model and what it imports lie in the current folder, without hiding other modules.

    The rest of the program imports nothing from there (see `common.import_path`).
    """
    try:
        folder = str(Path.cwd())
    except OSError:  # it was deleted
        folder = ""
    if not folder or folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _other_module(name: str) -> str:
    """Explain that an installed module has the name of the user's; empty if this is not the problem."""
    found = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
    own = next((path for path in (Path(f"{name}.py"), Path(name)) if path.exists()), None)
    if found is None or own is None or Path(found).is_relative_to(own.absolute()):
        return ""
    return f"; {name} is {found}, not {own}: give your file another name"


@torch.no_grad()
def inspect(model: nn.Module, name: str, classes: int, device: torch.device) -> ModelProperties:
    """Run a model on random images and return its properties.

    Raises `UsageError` if it cannot be trained exactly. This tests the model's behaviour, not the types of
    its layers. So it also finds batch statistics or functional dropout in a user's own code.
    """

    def refuse(problem: str) -> NoReturn:
        raise UsageError(f"--model {name}: {problem}")

    if not any(parameter.requires_grad for parameter in model.parameters()):
        refuse("it has no parameters to train")
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(1, *IMAGE_SHAPE, generator=generator).to(device) for _ in range(3))
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    frozen = [key for key, module in model.named_modules() if model.training and not module.training]
    model.train()

    def forward(*images: Tensor) -> Tensor:
        torch.manual_seed(0)
        try:
            return model(torch.cat(images))
        except Exception as error:
            shape = (len(images), *IMAGE_SHAPE)
            raise UsageError(f"--model {name}: it fails on images {shape}: {error}") from error

    torch.manual_seed(0)
    state_before = _generator_state(device)
    logits = forward(first, second)
    draws_random_numbers = not torch.equal(state_before, _generator_state(device))
    if not isinstance(logits, Tensor):
        refuse(f"it returns a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != (2, classes):
        shapes = f"{tuple(logits.shape)} for 2 images, not (2, {classes})"
        refuse(f"it returns shape {shapes}: the data has {classes} classes")
    changed = [key for key, value in model.named_buffers() if not torch.equal(value, buffers[key])]
    if changed:
        refuse(_why_buffers_change(model, changed[0], frozen))
    if not torch.equal(logits, forward(first, second)):
        refuse(f"it gives other logits when a pass is repeated; {_HIDDEN_STATE}")
    # Kernels may round differently, for instance if the model sorts its images.
    if not torch.allclose(
        logits[0], forward(first, third)[0], rtol=0, atol=1e-5 * float(logits.abs().max())
    ):
        refuse(f"one image's logits depend on the others in its batch; {_BATCH_STATISTICS}")
    if problem := _problem_in_evaluation(model, torch.cat((first, second)), device):
        refuse(problem)
    model.train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        total = forward(first, second).float().sum()
        if not total.requires_grad:
            refuse("its logits do not depend on its parameters")
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = tuple(key for key, gradient in zip(trained, gradients, strict=True) if gradient is None)
    return ModelProperties(sum(p.numel() for p in trained.values()), draws_random_numbers, unused)


def _problem_in_evaluation(model: nn.Module, images: Tensor, device: torch.device) -> str | None:
    """Return why a model cannot be evaluated exactly, or None. Leaves it in evaluation mode."""
    model.eval()
    state_before, unchanged = _generator_state(device), images.clone()
    logits = model(images)
    if not torch.equal(images, unchanged):
        return "it changes its images in place: let it begin with images.clone()"
    same_logits = torch.equal(logits, model(images))
    if not torch.equal(state_before, _generator_state(device)):
        return "it draws random numbers in evaluation"
    if not same_logits:
        return f"it gives other logits when a pass is repeated in evaluation; {_HIDDEN_STATE}"
    return None


def _why_buffers_change(model: nn.Module, key: str, frozen: Collection[str]) -> str:
    """Say what is wrong if buffer `key` changes; `frozen` modules had been set to evaluation."""
    name = key.rpartition(".")[0]
    problem = f"its buffer {key} changes in the forward pass"
    if not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm):
        return f"{problem}; {_STATE} (as a counter, a moving average or spectral norm does)"
    if name in frozen:
        return f"{problem}; train() has ended the evaluation mode of {name}: override train() to keep it"
    return f"{problem}; {_BATCH_STATISTICS}"


def forward(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """Return float32 logits `(n, classes)` of normalised images, computed in the given precision.

    Raises `UsageError` if the model does not return a tensor.
    """
    if precision == "fp32":
        logits = model(images)
    else:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(images)
    if not isinstance(logits, Tensor):
        raise UsageError(f"the model returns a {type(logits).__name__}, not a tensor of logits")
    return logits.float()


def _generator_state(device: torch.device) -> Tensor:
    """Return the state of the global generator from which layers on this device draw."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
