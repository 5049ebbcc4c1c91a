"""Find the function that makes a model of a given name: a built-in one, or a user's own.

A user's own factory is named `package.module:factory`. Its module may lie in the current folder.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..common.process_state import defined_state
from ..common.suggest import unknown
from ..errors import UsageError
from .zoo import MODELS


def find_factory(name: str) -> Callable[[int], Any]:
    """Return the function that makes models of this name. Raises `UsageError` if there is none."""
    if name in MODELS:
        return _function(name, MODELS[name])
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(unknown("model", name, MODELS, ", or package.module:factory"))
    try:
        with defined_state(), current_folder_last():
            factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
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
def temporary_model(name: str, factory: Callable[[int], Any]) -> Iterator[None]:
    """Make `name` a model inside this context, for a factory that cannot be imported."""
    before = dict(MODELS)
    MODELS[name] = factory
    try:
        yield
    finally:
        MODELS.clear()
        MODELS.update(before)


@contextlib.contextmanager
def current_folder_last() -> Iterator[None]:
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
