"""SHA-256 of nested values, to compare runs, ranks and files.

The encoding is canonical: it depends on values, types, shapes and dictionary keys. It does not depend on
the order of a dictionary's entries, on strides, or on a tensor's device.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch


def digest(value: object) -> str:
    """Return the hexadecimal SHA-256 of nested dictionaries, sequences, scalars, arrays and tensors.

    Raises `TypeError` for any other type, because there is no canonical encoding for it.
    """
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def chain(previous: str, ids: np.ndarray) -> str:
    """Extend the digest of a sequence by `ids`: SHA-256 of the previous digest and the new ids.

    `previous` and the result are hexadecimal. `ids` is an integer array of any type, hashed as
    little-endian int64. A checkpoint cannot store the state of a running SHA-256, but it can store a
    chain's 32 bytes.
    """
    return hashlib.sha256(bytes.fromhex(previous) + ids.astype("<i8").tobytes()).hexdigest()


START_OF_CHAIN = hashlib.sha256(b"").hexdigest()


def _feed(state: "hashlib._Hash", value: object) -> None:
    if isinstance(value, Mapping):
        _header(state, "map", len(value))
        for name in sorted(value, key=lambda name: (type(name).__name__, str(name))):
            _feed(state, name)
            _feed(state, value[name])
    elif isinstance(value, list | tuple):
        _header(state, "list", len(value))
        for item in value:
            _feed(state, item)
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        _header(state, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        state.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        _header(state, value.dtype.name, value.shape)
        little_endian = value.astype(value.dtype.newbyteorder("<"), copy=False)
        state.update(np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8).data)
    elif value is None or isinstance(value, bool | int | float | str):
        _header(state, type(value).__name__, repr(value))
    else:
        raise TypeError(f"no canonical bytes for a {type(value).__name__}")


def _header(state: "hashlib._Hash", *parts: object) -> None:
    text = repr(parts).encode()
    state.update(len(text).to_bytes(8, "little") + text)
