"""Make a data set of arrays in memory, with the same checks as for one from files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .datasets import Dataset, pixel_statistics
from .decode import MAX_CLASSES, SIDE, require_from_zero


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "own",
) -> Dataset:
    """Make a data set of NumPy arrays or torch tensors, which are copied.

    Images are uint8 `(n, 28, 28)`, white on black like MNIST's. Labels are integers `(n,)`, counted from 0.
    Without `class_names`, the highest label determines the number of classes, their names are their
    numbers, and labels that begin at 1 are refused as a mistake. `name` is the data set's name in the run's
    records. Raises `DataError`, which names the argument, for anything else.
    """
    train = _check_images("train_images", train_images), _check_labels("train_labels", train_labels)
    test = _check_images("test_images", test_images), _check_labels("test_labels", test_labels)
    for split, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels):
            raise DataError(f"{split}_images has {len(images)} images, {split}_labels {len(labels)} labels")
    if class_names is None:
        require_from_zero(train[1], "train_labels")
    highest = max(int(train[1].max()), int(test[1].max()))
    names = tuple(map(str, range(highest + 1) if class_names is None else class_names))
    if highest >= len(names):
        raise DataError(f"class_names has {len(names)} names, but there is a label {highest}")
    mean, std = pixel_statistics(train[0])
    return Dataset(name, *train, *test, names, mean, std, "given as arrays")


def _check_images(name: str, images: Any) -> NDArray[np.uint8]:
    array = _as_numpy(images)
    if array.dtype != np.uint8:
        raise DataError(f"{name} must be uint8, pixels from 0 to 255, not {array.dtype}")
    if array.ndim != 3 or array.shape[1:] != (SIDE, SIDE) or not len(array):
        raise DataError(f"{name} must be of shape (n, {SIDE}, {SIDE}), not {array.shape}")
    return np.array(array, order="C")


def _check_labels(name: str, labels: Any) -> NDArray[np.uint8]:
    array = _as_numpy(labels)
    if array.dtype.kind not in "iu":
        raise DataError(f"{name} must be integers, not {array.dtype}")
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name} must be of shape (n,), not {array.shape}")
    if array.min() < 0 or array.max() >= MAX_CLASSES:
        raise DataError(f"{name} must be from 0 to 255, not {array.min()} to {array.max()}")
    return np.array(array, np.uint8, order="C")


def _as_numpy(values: Any) -> NDArray[Any]:
    """Convert an array or a tensor on any device to a NumPy array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
