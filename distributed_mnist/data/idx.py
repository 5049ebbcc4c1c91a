"""Read and write IDX, the file format of MNIST, raw or gzipped: `read(path)` and `write(path, array)`.

A file has two zero bytes, one byte for the type, one for the number of dimensions, the dimensions as
unsigned 32-bit integers, then the numbers, all big-endian (Y. LeCun, "The MNIST database"). The first bytes
of a file, not its name, determine whether it is gzipped.

Any input gives an array or a one-line `DataError`. The file's actual bytes limit the memory use: nothing is
allocated just because a header declares it.
"""

import gzip
import hashlib
import io
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.atomic_write import written_aside
from ..common.regular_file import open_regular
from ..errors import DataError

GZIP_MAGIC = b"\x1f\x8b"

_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MAX_DIMENSIONS = 32  # NumPy before 2.0 has no more
_MAX_BYTES = 4 << 30  # 5 million images; limits what a small gzip bomb can unpack to
_CHUNK = 1 << 20
_SMALL = 64 << 20  # bytes that a file may unpack to, whatever its own size
_MAX_RATIO = 100  # of unpacked and own size above that; digits have about 5


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


def one_line(path: Path | str) -> str:
    """Return `path` for a message, quoted and escaped if it has unprintable characters like newlines."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def read(path: Path) -> NDArray[Any]:
    """Return the array in the file, in native byte order, C-contiguous and writable.

    Raises DataError if the file does not exist, is not a regular file, is unreadable, or is invalid (see
    `parse`).
    """
    name = one_line(path)
    try:
        with open_regular(path) as file:
            return _unpack(file, name)
    except (OSError, ValueError) as error:  # ValueError: a name that contains NUL
        raise DataError(f"{name}: {getattr(error, 'strerror', None) or 'cannot be read'}") from error


def parse(data: bytes, name: str) -> NDArray[Any]:
    """Return the array in `data`, the bytes of an IDX file, raw or gzipped; `name` is for messages.

    Raises DataError for truncated data, trailing bytes, no IDX header, invalid dimensions, or damaged gzip
    data.
    """
    return _unpack(io.BytesIO(data), name)


def _unpack(file: BinaryIO, name: str) -> NDArray[Any]:
    zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    most = max(_SMALL, _MAX_RATIO * file.seek(0, io.SEEK_END)) if zipped else _MAX_BYTES
    file.seek(0)
    # `read1` returns the bytes before the damage and fails only afterwards, so the message can count them.
    stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
    content = bytearray()
    try:
        return _parse(stream, content, name, min(most, _MAX_BYTES))
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: damaged gzip data after {len(content)} unpacked bytes ({error})"
        ) from error
    except EOFError as error:
        raise DataError(
            f"{name}: truncated: the gzip data ends after {len(content)} unpacked bytes"
        ) from error
    except MemoryError as error:
        raise DataError(f"{name}: does not fit into memory") from error


def _parse(stream: _Readable, content: bytearray, name: str, most: int) -> NDArray[Any]:
    """Parse `stream` to its end; refuse it unread if its header declares more than `most` bytes.

    Appends the bytes to `content`, so that error messages can count them.
    """
    _fill(stream, content, 4)
    if not content:
        raise DataError(f"{name}: empty")
    if not b"\0\0".startswith(content[:2]):
        raise DataError(f"{name}: not an IDX file: starts with {content[:4].hex(' ')}, not with 00 00")
    if len(content) < 4:
        raise DataError(f"{name}: truncated: {len(content)} bytes, an IDX header has at least 4")
    code, dimensions = content[2:4]
    if code not in _DTYPES:
        raise DataError(f"{name}: unknown IDX type 0x{code:02x}")
    if dimensions > _MAX_DIMENSIONS:
        raise DataError(f"{name}: invalid header: {dimensions} dimensions")
    start = 4 + 4 * dimensions
    _fill(stream, content, start)
    if len(content) < start:
        raise DataError(f"{name}: truncated: {len(content)} bytes, its header has {start}")

    dtype = _DTYPES[code]
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    # Leave zeros out of the product: NumPy refuses 0 x 4294967295 x 4294967295, although it is empty.
    declared = math.prod(size for size in shape if size) * dtype.itemsize
    if declared > most:
        too_many = ", too many for so small a file" if declared <= _MAX_BYTES else ""
        numbers = " x ".join(map(str, shape))
        raise DataError(f"{name}: invalid header: it declares {numbers} numbers{too_many}")
    end = start + math.prod(shape) * dtype.itemsize
    # One more byte, to detect trailing bytes and to make gzip check its CRC.
    _fill(stream, content, end + 1)
    if len(content) < end:
        raise DataError(f"{name}: truncated: {len(content)} of the {end} bytes that its header declares")
    if len(content) > end:
        raise DataError(f"{name}: trailing bytes after the {end} that its header declares")
    stored = np.frombuffer(content, dtype, offset=start).reshape(shape)
    # If the byte order is already native, this is a view of `content`, not a second copy of a large file.
    return stored.astype(dtype.newbyteorder("="), copy=False)


def _fill(stream: _Readable, content: bytearray, size: int) -> None:
    """Append to `content` until it has `size` bytes or the stream ends."""
    while len(content) < size:
        chunk = stream.read1(min(size - len(content), _CHUNK))
        if not chunk:
            return
        content += chunk


def _encode(array: NDArray[Any], name: str) -> tuple[bytes, memoryview]:
    """Return the IDX header of `array`, and the bytes of its numbers. Raises DataError."""
    dtype = array.dtype.newbyteorder(">")
    code = next((code for code, known in _DTYPES.items() if known == dtype), None)
    if code is None:
        raise DataError(f"{name}: IDX has no type for {array.dtype}")
    if array.ndim > _MAX_DIMENSIONS or array.nbytes > _MAX_BYTES or max(array.shape, default=0) >= 1 << 32:
        raise DataError(
            f"{name}: {' x '.join(map(str, array.shape))} numbers are too many for one IDX file"
        )
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header, np.asarray(array, dtype, order="C").reshape(-1).view(np.uint8).data


def write(path: Path, array: NDArray[Any]) -> None:
    """Write `array`, gzipped if the name ends with `.gz`; the same array always gives the same bytes.

    Writes the complete file or none. Raises DataError for a type that IDX lacks, an array that is too
    large, a folder that cannot be written, or a full disk.
    """
    name = one_line(path)
    header, numbers = _encode(array, name)
    try:
        with written_aside(path) as part, part.open("wb") as file:
            zipped = path.suffix == ".gz"
            with gzip.GzipFile("", "wb", 6, file, mtime=0) if zipped else nullcontext(file) as stream:
                stream.write(header)
                stream.write(numbers)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise DataError(f"{name}: cannot be written: {reason}") from error


def digest(array: NDArray[Any]) -> str:
    """Return the SHA-256 of the unpacked IDX file that `write` would make of `array`."""
    header, numbers = _encode(array, "array")
    sha256 = hashlib.sha256(header)
    sha256.update(numbers)
    return sha256.hexdigest()
