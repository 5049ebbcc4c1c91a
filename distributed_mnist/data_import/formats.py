"""The formats that can be imported, and the reader of each."""

import importlib
from collections.abc import Callable
from pathlib import Path

from ..data.recognise import Kind
from .part import Part, PartName, Progress

Reader = Callable[[tuple[Path, ...], PartName, Progress], Part | None]
"""Reads a part from its files, in the order in which `recognise` found them. Returns None if they lack it.

Raises DataError, in one line that names the file, for a file that is damaged or too large."""

_READERS: dict[Kind, str] = {
    "npz": "npz:read",
    "csv": "csv_tables:read",
    "parquet": "parquet:read",
    "torch": "torch_tensors:read",
    "cifar-binary": "cifar:read_binary",
    "cifar-python": "cifar:read_python",
    "pictures": "picture_folders:read",
    "idx": "idx_files:read",
}
"""Module and function by format. The modules are imported when they are used: torch takes seconds."""


def reader(kind: Kind) -> Reader:
    """Return the function that reads files of this format."""
    module, _, function = _READERS[kind].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)
