"""What a checkpoint from a stranger could do although it runs no code, kept from it: fill the
memory, never end, or be read as something else than it holds.

torch's reader unfolds a packed record to any size, checks no checksum, and gives for a record that is
marked as a folder whatever the memory held. A pickle may ask for gigabytes of zeros, or say "twice the one
before" forty times over. A tensor of one number may have the shape of a billion.
"""

import io
import pickletools
import re
import zipfile
from typing import Any

import torch

_ZIP = b"PK\x03\x04"  # as torch tells its archives from the files that it wrote before 1.6
_PICKLES_BEFORE_1_6 = 5  # in a row: a number, the protocol, the machine, the content, names of storages
_STORAGE = re.compile(r"torch \w+Storage")
_KNOWN = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
}


def sound(data: bytes) -> bytes:
    """A file that torch reads as it is meant: an archive written anew from what is in this one.

    Raises an error for one that torch did not write: packed, overlapping, with a wrong checksum, or with a
    pickle that names more than tensors and dictionaries.
    """
    if not data.startswith(_ZIP):
        _require_known(io.BytesIO(data), _PICKLES_BEFORE_1_6)
        return data
    anew = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(anew, "w") as again:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its archive is packed")
        if sum(record.file_size for record in records) > len(data):
            raise ValueError("its archive holds more than the file")
        if len({record.filename for record in records}) < len(records):
            raise ValueError("its archive holds a name twice")
        for record in records:
            content = archive.read(record)  # which looks at the checksum
            if record.filename.endswith(".pkl"):
                _require_known(io.BytesIO(content), 1)
            again.writestr(zipfile.ZipInfo(record.filename), content)
    return anew.getvalue()


def _require_known(stream: io.BytesIO, pickles: int) -> None:
    """Raise `ValueError` if one of the pickles in `stream` is damaged, or names more than it needs."""
    for _ in range(pickles):
        for operation, argument, _ in pickletools.genops(stream):
            # Of another protocol the names are on the stack: there is none here, and it is refused.
            named = operation.name.endswith("GLOBAL")
            if named and argument not in _KNOWN and not _STORAGE.fullmatch(str(argument)):
                raise ValueError(
                    "it holds more than tensors and plain values, and loading those could run code"
                )


def require_bounded(loaded: Any, size: int) -> None:
    """Raise `ValueError` unless `loaded`, from a file of `size` bytes, can be walked through in short time.

    It has no more values than the file has bytes, and no tensor has more elements than its memory.
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
                raise ValueError("a tensor in it is not a plain one")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it has more elements than its memory")
