"""Find the function that makes a model of a given name: a built-in one, or a user's own."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..common.suggest import unknown
from ..config import MNIST_SHAPE, ImageShape
from ..errors import UsageError
from ..user_code import functions
from .zoo import MODELS


def find_factory(name: str) -> Callable[[int, ImageShape], Any]:
    """Return the function that makes models of this name, for a number of classes and a shape of images.

    A user's own has the name `package.module:factory`. It gets the shape if it has a parameter `shape`.
    Raises `UsageError` if there is none.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise UsageError(unknown("model", name, MODELS, ", or package.module:factory"))
    factory = functions.find("--model", name)
    if isinstance(factory, nn.Module):
        raise UsageError(
            f"--model {name}: this is a {type(factory).__name__} itself: give a function of the number of "
            "classes that returns one"
        )
    return partial(_call, factory)  # `build` checks what it returns


def _call(factory: Callable[..., Any], classes: int, shape: ImageShape) -> Any:
    return factory(classes, shape=shape) if _takes_shape(factory) else factory(classes)


def _takes_shape(factory: Callable[..., Any]) -> bool:
    """Return whether a factory has a parameter `shape` that can be passed by name."""
    try:
        parameter = inspect.signature(factory).parameters.get("shape")
    except (TypeError, ValueError):  # Python does not know its signature
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter is not None and parameter.kind in by_name


def shape_hint(name: str, shape: ImageShape) -> str:
    """Return what to do if a user's model fails on images of this shape, as the end of a message."""
    if shape == MNIST_SHAPE or ":" not in name or _takes_shape(functions.find("--model", name)):
        return ""
    return "; let its factory take a second parameter, shape, which is (channels, height, width)"
