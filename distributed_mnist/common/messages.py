"""Encode values that ranks send each other, and decode them as an expected type.

Messages are MessagePack. Unlike pickle, decoding one cannot run code, and a message of another type is an
error.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

T = TypeVar("T")

_DTYPES = {"float32": np.float32, "int64": np.int64}  # of the tensors in a checkpoint


def encode(value: object) -> bytes:
    """Return a value as bytes.

    It may consist of plain values, lists, tuples, sets, dictionaries, dataclasses, paths and CPU tensors.
    Raises `TypeError` for anything else.
    """
    return msgspec.msgpack.encode(value, enc_hook=_simplify)


def decode(data: bytes, expected: type[T]) -> T:
    """Return the value that `encode` was given. Raises `ValueError` if it is not of the expected type."""
    try:
        return msgspec.msgpack.decode(data, type=expected, dec_hook=_restore)
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"a message that is no {expected}: {error}") from error


def _simplify(value: object) -> object:
    if isinstance(value, Path):
        return os.fsencode(value)
    if isinstance(value, torch.Tensor):
        array = value.numpy()
        return array.dtype.name, array.shape, array.tobytes()
    raise TypeError(f"{type(value).__name__} cannot be sent to another rank")


def _restore(expected: type, value: Any) -> object:
    if issubclass(expected, Path):
        return Path(os.fsdecode(value))
    if issubclass(expected, torch.Tensor):
        dtype, shape, content = value
        return torch.from_numpy(np.frombuffer(content, _DTYPES[dtype]).reshape(shape).copy())
    raise TypeError(f"{expected.__name__} cannot be received from another rank")
