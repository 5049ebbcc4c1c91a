"""Find a user's function by its name, `package.module:function`.

Its module may lie in the current folder. The library also takes functions that cannot be imported, and
registers them under such a name while it runs.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.process_state import defined_state
from ..errors import UsageError

_REGISTERED: dict[str, Callable[..., Any]] = {}


def find(flag: str, name: str) -> Callable[..., Any]:
    """Return the function `package.module:function`. Raises `UsageError`, which names `flag` and `name`."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module_name, _, attribute = name.partition(":")
    try:
        with defined_state(), current_folder_last():
            function: Any = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{flag} {name}: {type(error).__name__}: {error}{_other_module(module_name)}"
        ) from error
    if not callable(function):
        raise UsageError(f"{flag} {name}: {attribute} is not callable")
    return function


@contextlib.contextmanager
def registered(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside this context, `find` returns these functions for their names, and does not import them."""
    before = dict(_REGISTERED)
    _REGISTERED.update(functions)
    try:
        yield
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)


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
