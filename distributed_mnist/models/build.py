"""Build a model from its name, place it on a device, and run it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..common.generators import PrivateDraws, same_torch_state, seed_generators
from ..common.process_state import defined_state
from ..common.random_keys import torch_seed
from ..config import MNIST_SHAPE, ImageShape, Precision, Recipe
from ..errors import UsageError
from ..exact.functions import ExactFunctions
from ..exact.initialisation import ExactInitialisation, InexactOperation
from ..exact.module import ExactModule
from ..exact.passes.evaluation_pass import EvaluationPass
from ..user_code.functions import current_folder_last
from .factory import find_factory, shape_hint
from .inspection import ModelProperties, equal, inspect


def make_model(
    recipe: Recipe, classes: int, device: torch.device, shape: ImageShape = MNIST_SHAPE
) -> tuple[nn.Module, ModelProperties]:
    """Build a recipe's model on a device, for images of a shape.

    Raises `UsageError` if it cannot be trained exactly.
    """
    exact = recipe.precision == "exact"
    model = build(recipe.model, classes, recipe.seed, shape, exact)
    if ":" in recipe.model:  # a user's own
        problem = _difference(model, build(recipe.model, classes, recipe.seed, shape, exact))
        if problem:
            raise UsageError(f"--model {recipe.model}: its factory {problem}")
    model = place(model, device, shape)
    return model, inspect(model, recipe.model, classes, device, shape)


def build(
    name: str, classes: int, seed: int, shape: ImageShape = MNIST_SHAPE, exact: bool = False
) -> nn.Module:
    """Build a model on the CPU. Its initial weights depend on `seed` alone.

    What it draws from the global generators is keyed. The settings of torch that it changes are restored.
    Lazy layers get their shapes. `name` is one of `MODELS` or `package.module:factory`, where
    `factory(classes)` or `factory(classes, shape)` returns a module. If `exact`, the weights
    have the same bits on every machine (see `ExactInitialisation`). Raises `UsageError` if there is no such
    factory or if it fails.
    """
    factory = find_factory(name)
    draws = ExactInitialisation() if exact else PrivateDraws(torch_seed("init", seed))
    problem: BaseException | None = None
    try:
        with defined_state(), current_folder_last():
            seed_generators("init", seed)
            with draws:
                model = factory(classes, shape)
                if isinstance(model, nn.Module) and _uninitialised(model):
                    if isinstance(draws, ExactInitialisation):
                        draws.may_be_inexact = True  # this pass only finds out shapes
                    problem = _failure(model, torch.device("cpu"), shape)
    except InexactOperation as error:
        raise UsageError(
            f"--model {name}: its factory uses {error} of torch, whose result may differ between machines, "
            "so it does not go with --precision exact"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--model {name}: its factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model {name}: the factory returned a {type(model).__name__}, not a torch module"
        )
    if problem is not None:
        raise UsageError(
            f"--model {name}: it fails on images {(2, *shape)}: {problem}{shape_hint(name, shape)}"
        )
    if lazy := _uninitialised(model):
        raise UsageError(f"--model {name}: its {lazy[0]} gets no shape, because no pass uses its layer")
    return model


def _uninitialised(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers of lazy layers that have made no pass yet."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def place(model: nn.Module, device: torch.device, shape: ImageShape = MNIST_SHAPE) -> nn.Module:
    """Move a model to a device and its convolutions' weights to channels-last layout.

    On CPU this layout is twice as fast. It decides which kernels run, and so the last bits. Therefore all
    code that runs a model must use this function. A model that fails with this layout, because it views a
    convolution's output as rows, keeps the contiguous one. `shape` is that of the images it will get.
    """
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    has_layout = any(p.ndim == 4 for p in model.parameters())
    if has_layout and _failure(model, device, shape) is not None:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if _failure(model, device, shape) is not None:  # it has another reason
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _failure(model: nn.Module, device: torch.device, shape: ImageShape) -> BaseException | None:
    """Run a model on two images, in evaluation and in training; return its exception, or None.

    The images are always the same. Modes and buffers are restored, and torch's generators too.
    """
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    buffers: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        with torch.no_grad(), same_torch_state(device), same_modes(model):
            for training in (False, True):
                for buffer in model.buffers():  # a lazy layer's are filled in its first pass
                    if not is_lazy(buffer):
                        buffers.setdefault(id(buffer), (buffer, buffer.clone()))
                model.train(training)(images.clone())
    except (Exception, SystemExit) as error:
        return error
    finally:
        for buffer, value in buffers.values():
            if not torch.equal(buffer, value):  # a buffer may be a view that cannot be written
                buffer.copy_(value)
    return None


@contextlib.contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Restore afterwards which modules are in training mode and which in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward(model: Callable[[Tensor], Any], images: Tensor, precision: Precision) -> Tensor:
    """Return float32 logits `(n, classes)` of normalised images, computed in this precision.

    Raises `UsageError` if the model does not return a tensor.
    """
    if precision == "auto":
        raise ValueError("a precision must have been chosen")
    if precision == "exact" and not isinstance(model, ExactModule):
        with ExactFunctions(EvaluationPass(images.device)):
            logits = model(images)
    elif precision in ("fp32", "exact"):
        logits = model(images)
    else:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(images)
    if not isinstance(logits, Tensor):
        raise UsageError(f"the model returns a {type(logits).__name__}, not a tensor of logits")
    return logits.float()


def _difference(model: nn.Module, again: nn.Module) -> str | None:
    """Return what is wrong if two calls of a factory made different models, as the end of a sentence."""
    if again is model:
        return "returns the same module at each call: it must make a new one"
    first, second = (
        dict(itertools.chain(made.named_parameters(), made.named_buffers())) for made in (model, again)
    )
    if first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first):
        return None
    return (
        "makes different weights at each call: it draws random numbers from a generator without a fixed "
        "seed, keeps a state, or another thread draws from the same generator"
    )
