"""Refuse checkpoints that are harmful to load, even though they cannot run code.

`weights_only=True` prevents code execution. It does not protect against a file that fills the memory, takes
forever to read, or is read as something other than its content. torch's reader unpacks a compressed record
to any size, verifies no checksum, and returns uninitialised memory for a record that is marked as a folder.
A pickle may request gigabytes of zeros, or double a value forty times. A tensor that stores one number may
claim a billion elements.
"""

import io
import pickletools
import re
import zipfile
from typing import Any

import torch

_ZIP_MAGIC = b"PK\x03\x04"  # start of torch's archives, but not of the files it wrote before version 1.6
_PICKLES_BEFORE_1_6 = 5  # in sequence: magic number, protocol, system, content, storage names
_STORAGE = re.compile(r"torch \w+Storage")
_ALLOWED_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
}


def sanitize(data: bytes) -> bytes:
    """Return an equivalent file that is safe to pass to `torch.load`: a new archive with the same records.

    Raises an error for a file that torch cannot have written: one that is compressed, or has overlapping
    records, a wrong checksum, or a pickle that names anything but tensors and dictionaries.
    """
    if not data.startswith(_ZIP_MAGIC):
        _require_allowed_globals(io.BytesIO(data), _PICKLES_BEFORE_1_6)
        return data
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(output, "w") as new_archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its archive is compressed")
        if sum(record.file_size for record in records) > len(data):
            raise ValueError("its archive holds more than the file")
        if len({record.filename for record in records}) < len(records):
            raise ValueError("its archive holds a name twice")
        for record in records:
            content = archive.read(record)  # checks the checksum
            if record.filename.endswith(".pkl"):
                _require_allowed_globals(io.BytesIO(content), 1)
            new_archive.writestr(zipfile.ZipInfo(record.filename), content)
    return output.getvalue()


def _require_allowed_globals(stream: io.BytesIO, pickles: int) -> None:
    """Raise `ValueError` if one of the pickles in `stream` is damaged, or names a forbidden global."""
    for _ in range(pickles):
        for operation, argument, _ in pickletools.genops(stream):
            # STACK_GLOBAL, in newer protocols, takes the name from the stack. Its argument here is None, so
            # it is refused.
            is_global = operation.name.endswith("GLOBAL")
            if is_global and argument not in _ALLOWED_GLOBALS and not _STORAGE.fullmatch(str(argument)):
                raise ValueError(
                    "it holds more than tensors and plain values, and loading those could run code"
                )


def require_bounded(loaded: Any, size: int) -> None:
    """Raise `ValueError` unless `loaded`, from a file of `size` bytes, can be traversed in a short time.

    It may not have more values than the file has bytes, or a tensor with more elements than its memory.
    """
    values = [loaded]
    while values:
        size -= 1
        if size < 0:
            raise ValueError("it holds more values than its file has bytes")
        value = values.pop()
        if isinstance(value, dict):
            values += value.keys()
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError("one of its tensors is not a plain CPU tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("one of its tensors has more elements than its memory holds")
