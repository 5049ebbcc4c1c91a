"""Send a user's functions to the workers that our launcher starts: `pack` here, `unpack` there.

A function in a module that workers can import is sent as its name. Any other, such as one in a script, in a
notebook's cell or inside of another function, is sent by value, with all that it uses. The launcher passes
the bytes to each worker with its other arguments. They are never read from a port.
"""

import contextlib
import functools
import inspect
import io
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from ..common.process_state import defined_state
from ..errors import UsageError
from .functions import current_folder_last


def pack(functions: Mapping[str, Callable[..., Any]]) -> bytes:
    """Return functions by name as bytes, with the present values of what they use.

    Raises `UsageError`, which says which function cannot be sent, and because of what.
    """
    try:
        with defined_state():
            return _to_bytes(dict(functions))
    except Exception as error:
        name = next((name for name in functions if _problem(functions[name])), ", ".join(functions))
        variable, value, problem = _cause(functions[name]) if name in functions else ("", None, error)
        uses = f"it uses {variable}, of type {type(value).__qualname__}: " if variable else ""
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise UsageError(
            f"{name} cannot be sent to the processes of nproc: {uses}{reason}; make such an object inside "
            "the function, or leave nproc at 1"
        ) from error


def unpack(packed: bytes) -> dict[str, Callable[..., Any]]:
    """Return the functions in the bytes of `pack`. Raises `UsageError` if they cannot be made here."""
    try:
        with defined_state(), current_folder_last():
            return cloudpickle.loads(packed)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the processes of nproc cannot use what they were sent: {type(error).__name__}: {error}"
        ) from error


class _Pickler(cloudpickle.Pickler):
    """Sends by value also what a module contains that workers would not find, and cached functions."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._is_found = functools.cache(_is_found)

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`. It is called for each function, class, module and instance."""
        name = obj.__name__ if isinstance(obj, types.ModuleType) else getattr(obj, "__module__", None)
        if isinstance(name, str) and name in sys.modules and not self._is_found(name):
            cloudpickle.register_pickle_by_value(sys.modules[name])
        if isinstance(obj, functools._lru_cache_wrapper) and (
            name == "__main__" or "<locals>" in obj.__qualname__ or not self._is_found(name)
        ):
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        return super().reducer_override(obj)


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    return functools.lru_cache(**parameters)(function)


def _is_found(module: str) -> bool:
    """Return whether a worker that imports this module gets the file that this process has imported.

    It does not if the module was loaded by its path, as by pytest's `--import-mode=importlib`. Workers have
    the same `sys.path`.
    """
    own = getattr(sys.modules.get(module), "__spec__", None)
    if own is None or module == "__main__":
        return True
    parent = sys.modules.get(module.rpartition(".")[0])
    for finder in sys.meta_path:
        if (found := finder.find_spec(module, getattr(parent, "__path__", None))) is not None:
            return found.origin == own.origin
    return False


def _to_bytes(value: Any) -> bytes:
    registered = cloudpickle.list_registry_pickle_by_value()
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    finally:
        for name in cloudpickle.list_registry_pickle_by_value() - registered:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])
    return buffer.getvalue()


def _problem(value: Any) -> Exception | None:
    """Return the error from sending a value, or None."""
    try:
        _to_bytes(value)
    except Exception as error:
        return error
    return None


def _cause(function: Any) -> tuple[str, Any, Exception]:
    """Return the name and value of the variable that keeps a function from being sent, and its error.

    The name is empty if the function does not use it by a name, but contains it.
    """
    found, seen, candidates = ("", function, Exception()), set[int](), [("", function)]
    while candidates:
        name, value = candidates.pop()
        if id(value) in seen or (problem := _problem(value)) is None:
            continue
        seen.add(id(value))
        found, used = (name, value, problem), _variables(value)
        if not used:
            break
        candidates += used
    return found


def _variables(code: Any) -> list[tuple[str, Any]]:
    """Return names and values of what a function or the functions of a class use."""
    if isinstance(code, functools.partial):
        arguments = [(f"argument {i}", value) for i, value in enumerate(code.args, 1)]
        return [("", code.func), *arguments, *code.keywords.items()]
    if isinstance(code, type):
        own = [(name, getattr(value, "__func__", value)) for name, value in vars(code).items()]
        return [(base.__name__, base) for base in code.__bases__] + [
            (name, value)
            for name, value in own
            if isinstance(value, types.FunctionType) or not name.startswith("__")
        ]
    function = inspect.unwrap(getattr(code, "__func__", code))
    if not isinstance(function, types.FunctionType):
        return []
    names, codes = set[str](), [function.__code__]
    for part in codes:
        names.update(part.co_names)
        codes += [constant for constant in part.co_consts if isinstance(constant, types.CodeType)]
    uses = {name: value for name, value in function.__globals__.items() if name in names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            uses[name] = cell.cell_contents
    uses |= {name: given.default for name, given in inspect.signature(function).parameters.items()}
    return list(uses.items())
