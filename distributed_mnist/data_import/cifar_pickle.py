"""Read the pickles of CIFAR's Python version without running what a pickle may ask for.

Python's `pickle` calls whatever a file names. Here a file may only name what a NumPy array needs, and gets
functions of this module instead of NumPy's. Only the operations that such a file needs are accepted. So
nothing is allocated just because the file asks for it.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..data.idx import one_line
from ..errors import DataError

_OPERATIONS = re.compile(
    "PROTO|FRAME|STOP|MARK|EMPTY_DICT|EMPTY_LIST|EMPTY_TUPLE|TUPLE[123]?|LIST|DICT|APPENDS?|SETITEMS?|"
    "(?:LONG_)?BINPUT|PUT|MEMOIZE|(?:LONG_)?BINGET|GET|NONE|NEWTRUE|NEWFALSE|INT|BININT[12]?|STRING|"
    "(?:SHORT_)?BINSTRING|UNICODE|(?:SHORT_)?BINUNICODE|(?:SHORT_)?BINBYTES|BINBYTES8|"
    "GLOBAL|STACK_GLOBAL|REDUCE|BUILD"
)


def load(data: bytes, where: str) -> dict[str, Any]:
    """Return the dictionary in a pickle: of strings, integers, lists and uint8 arrays.

    `where` names the file in messages. Raises DataError for anything else.
    """
    try:
        _require_known_operations(data)
        loaded = _Unpickler(data).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{where}: no file of CIFAR's: {one_line(' '.join(str(error).split())[:120])}"
        ) from None
    if not isinstance(loaded, dict):
        raise DataError(f"{where}: no file of CIFAR's: holds no dictionary")
    return {
        (key.decode("latin1") if isinstance(key, bytes) else str(key)): (
            value.array if isinstance(value, _Array) else value
        )
        for key, value in loaded.items()
    }


def _require_known_operations(data: bytes) -> None:
    """Raise ValueError for an operation that CIFAR's files do not need, or a memo index beyond the file."""
    for operation, argument, _ in pickletools.genops(data):
        if not _OPERATIONS.fullmatch(operation.name):
            raise ValueError(f"it uses {operation.name}")
        if "PUT" in operation.name and not 0 <= int(argument or 0) <= len(data):
            raise ValueError("damaged")


class _Array:
    """Takes the place of a NumPy array while it is unpickled."""

    array: np.ndarray

    def __init__(self, encode: Callable[[str, str], bytes]) -> None:
        self._encode = encode

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype is not _UINT8 or fortran or not isinstance(content, bytes | str):
            raise ValueError("it has an array of another type than uint8")
        content = self._encode(content, "latin1") if isinstance(content, str) else content
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


class _Type:
    """Takes the place of NumPy's type uint8."""

    def __setstate__(self, state: object) -> None:
        """Ignore the byte order, which a byte does not have."""


_UINT8 = _Type()


def _dtype(name: str, *_: object) -> _Type:
    if name != "u1":
        raise ValueError("it has an array of another type than uint8")
    return _UINT8


class _Replacement:
    """A function that a pickle may call, but not change: `BUILD` sets attributes of what it is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("damaged")


def _without_tuples_as_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Return an operation that first checks the keys, at these places of the stack.

    To hash a tuple that contains one other twice, and so on, takes forever. If they are nested too deeply,
    it ends the process.
    """

    def checked(unpickler: Any) -> None:
        if any(isinstance(key, tuple) for key in unpickler.stack[keys]):
            raise ValueError("it has a tuple as a key")
        load(unpickler)

    return checked


_SET = {pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: slice(0, None, 2), pickle.DICT: slice(0, None, 2)}
"""Operations that take keys from the stack, where `pickle._Unpickler` keeps what follows the last mark."""


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar = pickle._Unpickler.dispatch | {
        operation[0]: _without_tuples_as_keys(pickle._Unpickler.dispatch[operation[0]], keys)
        for operation, keys in _SET.items()
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._left = len(data)
        reconstruct = _Replacement(lambda *_: _Array(self._encode))
        self._globals: dict[tuple[str, str], _Replacement | None] = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): None,  # the first argument of `_reconstruct`, which ignores it
            ("numpy", "dtype"): _Replacement(_dtype),
            ("_codecs", "encode"): _Replacement(self._encode),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return this module's replacement for a global. Raises ValueError for one that has none."""
        if (module, name) not in self._globals:
            raise ValueError(f"it names {module}.{name}, which could run code")
        return self._globals[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """Return text as bytes, as Python 3 writes bytes for the protocols of Python 2.

        Raises ValueError if a file has the same text encoded again and again, to fill the memory.
        """
        if encoding != "latin1":
            raise ValueError(f"it uses the encoding {encoding}")
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("it makes more bytes than it has")
        return text.encode("latin1")
