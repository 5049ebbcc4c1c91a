"""A data set of arrays that somebody holds already, looked at as closely as one from files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .datasets import Dataset, pixel_statistics

_MOST_CLASSES = 256  # labels are bytes


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "own",
) -> Dataset:
    """A data set of NumPy arrays or torch tensors, which are copied.

    Images are uint8 `(n, 28, 28)`, white on black as MNIST's are; labels are integers `(n,)` from 0.
    Without `class_names` the classes are as many as the labels tell, named by their numbers. `name` is
    what the run's records call it. Raises `DataError`, naming the argument, for anything else.
    """
    train = _images("train_images", train_images), _labels("train_labels", train_labels)
    test = _images("test_images", test_images), _labels("test_labels", test_labels)
    for part, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels):
            raise DataError(f"{part}_images has {len(images)} images, {part}_labels {len(labels)} labels")
    highest = max(int(train[1].max()), int(test[1].max()))
    names = tuple(map(str, range(highest + 1) if class_names is None else class_names))
    if highest >= len(names):
        raise DataError(f"class_names has {len(names)} names, but there is a label {highest}")
    mean, std = pixel_statistics(train[0])
    return Dataset(name, *train, *test, names, mean, std, "given as arrays")


def _images(name: str, given: Any) -> NDArray[np.uint8]:
    array = _as_numpy(given)
    if array.dtype != np.uint8:
        raise DataError(f"{name} must be uint8, pixels from 0 to 255, not {array.dtype}")
    if array.ndim != 3 or array.shape[1:] != (28, 28) or not len(array):
        raise DataError(f"{name} must be of shape (n, 28, 28), not {array.shape}")
    return np.array(array, order="C")


def _labels(name: str, given: Any) -> NDArray[np.uint8]:
    array = _as_numpy(given)
    if array.dtype.kind not in "iu":
        raise DataError(f"{name} must be integers, not {array.dtype}")
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name} must be of shape (n,), not {array.shape}")
    if array.min() < 0 or array.max() >= _MOST_CLASSES:
        raise DataError(f"{name} must be from 0 to 255, not {array.min()} to {array.max()}")
    return np.array(array, np.uint8, order="C")


def _as_numpy(given: Any) -> NDArray[Any]:
    """Of a tensor too, wherever it is."""
    return np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
