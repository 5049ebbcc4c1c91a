"""The training or the test part of a data set, as the readers return it, and checks that they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..common.regular_file import read_regular
from ..data.idx import one_line
from ..errors import DataError, reason

PartName = Literal["train", "test"]
Progress = Callable[[str, int, int | None], None]
MAX_BYTES = 4 << 30
"""Limits the images of one part, and what a compressed file may unpack to."""


@dataclass(frozen=True)
class Part:
    """Labelled images, as a file holds them."""

    images: NDArray[np.uint8]  # (n, height, width), or (n, height, width, 3) for colour
    labels: NDArray[np.int64] | None  # (n,); None if the file has none
    class_names: tuple[str, ...] = ()  # empty if the file has none; otherwise labels are indices of it
    note: str = ""  # for people: a conversion that they might not expect


def make_part(
    where: str, images: NDArray[Any], labels: Any, class_names: Sequence[str] = (), note: str = ""
) -> Part:
    """Return a part of arrays in any of the usual layouts; `where` names the file in messages.

    Images are integers from 0 to 255, `(n, height, width)` or with 1 or 3 channels at the end. Labels are
    integers `(n,)` or `(n, 1)`, or None. Raises DataError for anything else.
    """
    if images.dtype != np.uint8:
        if images.dtype.kind not in "iu" or (images.size and not 0 <= images.min() <= images.max() <= 255):
            raise DataError(f"{where}: images must be integers from 0 to 255, not {images.dtype} of others")
        images = images.astype(np.uint8)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or 0 in images.shape:
        raise DataError(
            f"{where}: images must be (n, height, width) or (n, height, width, 3), not {images.shape}"
        )
    if labels is not None:
        labels = np.asarray(labels)
        labels = labels[:, 0] if labels.shape == (len(images), 1) else labels
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError(f"{where}: labels must be integers (n,), not {labels.dtype} {labels.shape}")
        if len(labels) != len(images):
            raise DataError(f"{where}: {len(images)} images, but {len(labels)} labels")
        if class_names and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise DataError(
                f"{where}: labels from {labels.min()} to {labels.max()}, but {len(class_names)} classes"
            )
        labels = labels.astype(np.int64)
    return Part(np.ascontiguousarray(images), labels, tuple(class_names), note)


def content(path: Path) -> bytes:
    """Return a file's bytes. Raises DataError."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"{one_line(path)}: {reason(error)}") from error


class ImageStack:
    """Collects a known number of images of one size, grey `(h, w)` or colour `(h, w, 3)`."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._images: NDArray[np.uint8] | None = None
        self._first = ""

    def add(self, image: NDArray[np.uint8], name: str) -> None:
        """Add the next image; `name` is for messages. Raises DataError if its size is not the first's."""
        if self._images is None:
            if self._count * image.nbytes > MAX_BYTES:
                raise DataError(f"{name}: {self._count} images of this size exceed {MAX_BYTES >> 30} GiB")
            self._images, self._first = np.empty((self._count, *image.shape), np.uint8), name
        if image.shape[:2] != self._images.shape[1:3]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (image.shape, self._images.shape[1:3])]
            raise DataError(
                f"{name}: {sizes[0]} pixels, but {self._first} has {sizes[1]}: scale all to one size"
            )
        if image.ndim > self._images.ndim - 1:
            self._images = widened(self._images)
        self._images[self._filled] = image if image.ndim == self._images.ndim - 1 else widened(image)
        self._filled += 1

    def images(self) -> NDArray[np.uint8]:
        """Return all images, `(n, h, w)` if all are grey, otherwise `(n, h, w, 3)`."""
        assert self._images is not None and self._filled == self._count
        return self._images


def widened(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return grey images `(..., h, w)` in colour, `(..., h, w, 3)`."""
    return np.repeat(grey[..., None], 3, axis=-1)
