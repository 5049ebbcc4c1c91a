"""Convert the arrays in a data set's files to images and labels in one common form.

The differences: EMNIST stores its images transposed, the labels of EMNIST Letters start at 1, and QMNIST's
labels are a table with the class in the first of eight columns.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MNIST_SHAPE, describe_shape, shape_of
from ..errors import DataError
from .catalog import Entry, Role
from .idx import one_line

IMAGES_WANTED = "(n, height, width), or in colour (n, height, width, 3)"
MAX_CLASSES = 256  # labels are uint8


def content(entry: Entry, role: Role, path: Path, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the images or labels in a file, as `images` or `labels` does. Raises DataError."""
    return (images if role.endswith("images") else labels)(entry, path, stored)


def images(entry: Entry, path: Path, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Return upright images, uint8 `(n, h, w)` or in colour `(n, h, w, 3)`, C-contiguous.

    Those of a published data set are 28 by 28. Raises DataError naming `path`.
    """
    own, problem = entry.name == "idx", images_problem(stored.shape)
    fits = not problem if own else stored.shape[1:] == MNIST_SHAPE[1:]
    if stored.dtype != np.uint8 or not fits:
        wanted = IMAGES_WANTED if own else "(n, 28, 28)"
        why = f": {problem}" if own and problem else ""
        what = f"holds {stored.dtype} {_shape(stored)}, images are uint8 {wanted}{why}"
        raise DataError(f"{one_line(path)}: {what}")
    if not len(stored):
        raise DataError(f"{one_line(path)}: no images in it")
    return np.ascontiguousarray(stored.transpose(0, 2, 1) if entry.transposed else stored)


def images_problem(shape: tuple[int, ...]) -> str | None:
    """Return why an array of this shape does not hold images as they are stored; None if it does."""
    if len(shape) not in (3, 4):
        return "each image needs its height and width as dimensions"
    if 0 in shape[1:]:
        return "the images have no pixels"
    if len(shape) == 3:  # nobody has grey images that are three pixels wide
        return "this is one image in colour, without a dimension for several" if shape[2] == 3 else None
    problems = {
        1: "leave out the last dimension",
        3: None,
        4: "leave out the fourth channel (transparency)",
    }
    moved = "the colours must be the last dimension" if shape[1] == 3 else f"there are {shape[3]} channels"
    return problems.get(shape[3], moved)


def require_same_shape(
    train: NDArray[np.uint8], train_name: str, test: NDArray[np.uint8], where: str
) -> None:
    """Raise DataError unless training and test images have the same shape; `where` names the latter."""
    if train.shape[1:] != test.shape[1:]:
        shapes = [describe_shape(shape_of(images.shape)) for images in (test, train)]
        raise DataError(f"{where}: images of {shapes[0]}, but {train_name} has images of {shapes[1]}")


def labels(entry: Entry, path: Path, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Return classes counted from 0, uint8 `(n,)`, C-contiguous. Raises DataError naming `path`."""
    shape = (entry.label_columns,) if entry.label_columns > 1 else ()
    if stored.dtype.kind not in "iu" or stored.shape[1:] != shape or not stored.ndim:
        expected = f"(n, {entry.label_columns})" if shape else "(n,)"
        raise DataError(
            f"{one_line(path)}: holds {stored.dtype} {_shape(stored)}, labels are integers {expected}"
        )
    if not len(stored):
        raise DataError(f"{one_line(path)}: no labels in it")
    classes = stored[:, 0] if shape else stored
    low = entry.first_label
    high = low + (len(entry.class_names) or MAX_CLASSES) - 1
    wrong_rows = np.flatnonzero((classes < low) | (classes > high))
    if len(wrong_rows):
        raise DataError(
            f"{one_line(path)}: label {classes[wrong_rows[0]]} in row {wrong_rows[0]}, "
            f"but {entry.name} has labels from {low} to {high}"
        )
    return np.ascontiguousarray(classes - low, dtype=np.uint8)


def require_from_zero(train_labels: NDArray[np.uint8], where: str) -> None:
    """Raise DataError if the labels start at 1 and skip none: nobody means an empty class 0 then.

    `where` names the labels in the message.
    """
    present = np.unique(train_labels)
    if len(present) > 1 and np.array_equal(present, np.arange(1, len(present) + 1)):
        raise DataError(
            f"{where}: labels from 1 to {len(present)}, but they count from 0: subtract 1 from each"
        )


def require_pairs(images_path: Path, image_count: int, labels_path: Path, label_count: int) -> None:
    """Raise DataError unless there are as many labels as images."""
    if image_count != label_count:
        raise DataError(
            f"{one_line(labels_path)}: {label_count} labels, but {one_line(images_path.name)} "
            f"has {image_count} images"
        )


def _shape(array: NDArray[Any]) -> str:
    return f"({', '.join(map(str, array.shape))})"
