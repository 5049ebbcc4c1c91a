"""Find the function that makes a model of a given name: a built-in one, or a user's own."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.suggest import unknown
from ..errors import UsageError
from ..user_code import functions
from .zoo import MODELS


def find_factory(name: str) -> Callable[[int], Any]:
    """Return the function that makes models of this name. Raises `UsageError` if there is none.

    A user's own has the name `package.module:factory`.
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
    return factory  # `build` checks what it returns
