"""CIFAR-10's and CIFAR-100's own files, in the binary version and in the Python version."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.regular_file import read_regular
from ..data.decode import MAX_CLASSES
from ..data.idx import one_line
from ..errors import DataError, reason
from .cifar_pickle import load
from .part import Part, PartName, Progress, content, make_part

_SHAPE = (3, 32, 32)  # an image is stored as three planes
_PIXELS = 3072
_NAMES_BYTES = 1 << 16


def read_binary(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read records of a label (CIFAR-100: two, of which the second is the fine one) and an image."""
    images, labels = [], []
    for done, path in enumerate(paths):
        progress("reading CIFAR", done, len(paths))
        data = np.frombuffer(content(path), np.uint8)
        width = next((width for width in (_PIXELS + 1, _PIXELS + 2) if data.size % width == 0), 0)
        if not width or not data.size:
            raise DataError(f"{one_line(path)}: {data.size} bytes are no whole number of records")
        records = data.reshape(-1, width)
        labels.append(records[:, width - _PIXELS - 1])
        images.append(records[:, -_PIXELS:])
    return _part(paths, images, labels, _names_in_text(path.parent for path in paths))


def read_python(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read pickled dictionaries with an array `data` and a list `labels` or `fine_labels`."""
    images, labels = [], []
    for done, path in enumerate(paths):
        progress("reading CIFAR", done, len(paths))
        where, batch = one_line(path), load(content(path), one_line(path))
        pixels, classes = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
            raise DataError(f"{where}: has no array `data` of shape (n, {_PIXELS})")
        if not isinstance(classes, list) or not all(
            type(label) is int and 0 <= label < MAX_CLASSES for label in classes
        ):
            raise DataError(f"{where}: has no list `labels` or `fine_labels` of classes")
        images.append(pixels)
        labels.append(np.array(classes, dtype=np.int64))
    return _part(paths, images, labels, _names_in_pickle(path.parent for path in paths))


def _part(
    paths: tuple[Path, ...],
    images: list[NDArray[np.uint8]],
    labels: list[NDArray[np.int64]],
    names: list[str],
) -> Part:
    planes = np.concatenate(images).reshape(-1, *_SHAPE)
    return make_part(one_line(paths[0]), planes.transpose(0, 2, 3, 1), np.concatenate(labels), names)


def _names_in_text(folders: Iterable[Path]) -> list[str]:
    for folder in folders:
        for path in (folder / "batches.meta.txt", folder / "fine_label_names.txt"):
            if path.is_file():
                try:
                    return read_regular(path, _NAMES_BYTES).decode().split()
                except (OSError, UnicodeDecodeError) as error:
                    why = reason(error) if isinstance(error, OSError) else "not text"
                    raise DataError(f"{one_line(path)}: {why}") from error
    return []


def _names_in_pickle(folders: Iterable[Path]) -> list[str]:
    for folder in folders:
        for path in (folder / "batches.meta", folder / "meta"):
            if path.is_file():
                meta = load(content(path), one_line(path))
                names = meta.get("label_names", meta.get("fine_label_names"))
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise DataError(f"{one_line(path)}: has no list of names")
                return names
    return []
