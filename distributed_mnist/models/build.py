"""Build a model from its name, test whether it can be trained exactly, and run it.

A model is one of `zoo.MODELS` or a user's own factory, named `package.module:factory`.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..common.random_keys import torch_seed
from ..common.suggest import unknown
from ..config import Precision, Recipe
from ..errors import UsageError
from .zoo import IMAGE_SHAPE, MODELS


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
    return model


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device and its convolutions' weights to channels-last layout.

    On CPU this layout is twice as fast. It decides which kernels run, and so the last bits. Therefore all
    code that runs a model must use this function.
    """
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


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
        return MODELS[name]
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
    return factory  # `build` checks what it returns


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
    mixes_samples = not torch.equal(logits[0], forward(first, third)[0])
    if mixes_samples or changed:
        problem = "one image's logits depend on the others in its batch"
        if changed:
            problem = f"its buffer {changed[0]} changes in the forward pass"
        refuse(f"{problem}; batch statistics cannot be trained exactly, use per-sample norms")
    model.eval()
    state_before = _generator_state(device)
    pair = torch.cat((first, second))
    if not torch.equal(model(pair), model(pair)) or not torch.equal(state_before, _generator_state(device)):
        refuse("it draws random numbers in evaluation")
    model.train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        total = forward(first, second).float().sum()
        if not total.requires_grad:
            refuse("its logits do not depend on its parameters")
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = tuple(key for key, gradient in zip(trained, gradients, strict=True) if gradient is None)
    return ModelProperties(sum(p.numel() for p in trained.values()), draws_random_numbers, unused)


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
