"""NumPy's archives of arrays, such as Keras' `mnist.npz` and MedMNIST's files."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.regular_file import open_regular
from ..data.idx import one_line
from ..errors import DataError, reason
from .part import MAX_BYTES, Part, PartName, Progress, make_part

_NAMES = (("x_{}", "y_{}"), ("X_{}", "Y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
_SMALL = 64 << 20  # bytes that an array may unpack to, whatever its size in the archive
_MAX_RATIO = 100  # of unpacked and packed size above that


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part | None:
    """Read the arrays of a part, `x_train` and `y_train` or the like."""
    (path,) = paths
    where = one_line(path)
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for pattern in _NAMES:
                images, labels = (name.format(part) for name in pattern)
                if images in members:
                    progress("reading arrays", 0, None)
                    pixels = _array(archive, members[images], f"{where}: {images}")
                    found = members.get(labels)
                    classes = None if found is None else _array(archive, found, f"{where}: {labels}")
                    return make_part(f"{where}: {images}", pixels, classes)
    except OSError as error:
        raise DataError(f"{where}: {reason(error)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{where}: damaged ({one_line(str(error))})") from error
    if part == "train":
        raise DataError(
            f"{where}: has {', '.join(map(one_line, sorted(members)[:8]))}, but no x_train and y_train, "
            "and no train_images and train_labels"
        )
    return None


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    """Read an array. Its header is checked first, because NumPy allocates whatever a header declares."""
    if info.file_size > min(MAX_BYTES, max(_SMALL, _MAX_RATIO * info.compress_size)):
        raise DataError(f"{where}: unpacks to {info.file_size:,} bytes, too many")
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
        except Exception as error:  # NumPy evaluates the header, which raises almost anything
            raise DataError(
                f"{where}: not a NumPy array ({one_line(' '.join(str(error).split())[:80])})"
            ) from error
        if dtype.hasobject:
            raise DataError(f"{where}: holds Python objects, which are not read: they can run code")
        data = file.read()  # at most `file_size` bytes; checks the checksum
    count = int(np.prod(shape, dtype=object))
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{where}: {len(data)} bytes, its header declares {count * dtype.itemsize}")
    try:
        return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: not a NumPy array ({one_line(str(error))})") from error
