"""Make a data set of arrays in memory, with the same checks as for one from files."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .catalog import Role
from .datasets import IMAGES_OF, Dataset, pixel_statistics
from .decode import IMAGES_WANTED, MAX_CLASSES, images_problem, require_from_zero, require_same_shape


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

    Images are uint8, `(n, h, w)` in grey (white on black, if they are like MNIST's) or `(n, h, w, 3)` in
    colour. torch's `(n, 1, h, w)` and `(n, 3, h, w)` are taken too: a last dimension of 3 is the colours.
    Labels are integers `(n,)`, counted from 0.
    Without `class_names`, the highest label determines the number of classes, their names are their
    numbers, and labels that begin at 1 are refused as a mistake. `name` is the data set's name in the run's
    records. Raises `DataError`, which names the argument, for anything else.
    """
    arrays = _check_arrays(train_images, train_labels, test_images, test_labels, copy=True)
    if class_names is None:
        require_from_zero(arrays["train_labels"], "train_labels")
        class_names = list(map(str, range(_highest_label(arrays) + 1)))
    try:
        names = tuple(map(str, class_names))
    except TypeError:
        raise DataError(f"class_names must be a list of names, not {class_names!r:.80}") from None
    _require_names(arrays, names)
    mean, std = pixel_statistics(arrays["train_images"])
    return Dataset(name, **arrays, class_names=names, mean=mean, std=std, source="given as arrays")


def checked(dataset: Dataset) -> Dataset:
    """Return a data set that a caller may have made or changed by hand, with contiguous uint8 arrays.

    Raises `DataError`, which names the field, if it cannot be used.
    """
    arrays = _check_arrays(**dataset.arrays(), copy=False)
    _require_names(arrays, dataset.class_names)
    mean, std = dataset.mean, dataset.std
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(f"mean and std must be finite, and std above 0, not {mean} and {std}")
    return replace(dataset, **arrays)


def _check_arrays(
    train_images: Any, train_labels: Any, test_images: Any, test_labels: Any, *, copy: bool
) -> dict[Role, NDArray[np.uint8]]:
    arrays: dict[Role, NDArray[np.uint8]] = {
        "train_images": _check_images("train_images", train_images, copy),
        "train_labels": _check_labels("train_labels", train_labels, copy),
        "test_images": _check_images("test_images", test_images, copy),
        "test_labels": _check_labels("test_labels", test_labels, copy),
    }
    for labels, images in IMAGES_OF.items():
        if len(arrays[images]) != len(arrays[labels]):
            counts = f"{len(arrays[images])} images, {labels} {len(arrays[labels])} labels"
            raise DataError(f"{images} has {counts}")
    require_same_shape(arrays["train_images"], "train_images", arrays["test_images"], "test_images")
    return arrays


def _highest_label(arrays: dict[Role, NDArray[np.uint8]]) -> int:
    return max(int(arrays["train_labels"].max()), int(arrays["test_labels"].max()))


def _require_names(arrays: dict[Role, NDArray[np.uint8]], names: Sequence[str]) -> None:
    if (highest := _highest_label(arrays)) >= len(names):
        raise DataError(f"class_names has {len(names)} names, but there is a label {highest}")


def _check_images(name: str, images: Any, copy: bool) -> NDArray[np.uint8]:
    array = _as_numpy(name, images)
    if array.dtype != np.uint8:
        floats = "; convert floats from 0 to 1 by (255 * images).round().astype('uint8')"
        hint = floats if array.dtype.kind == "f" else ""
        raise DataError(f"{name} must be uint8, pixels from 0 to 255, not {array.dtype}{hint}")
    array = _as_stored(array)
    if problem := images_problem(array.shape):
        raise DataError(f"{name} must be of shape {IMAGES_WANTED}, not {array.shape}: {problem}")
    if not len(array):
        raise DataError(f"{name} is empty: there must be at least one image")
    return np.array(array, order="C") if copy else np.ascontiguousarray(array)


def _as_stored(images: NDArray[Any]) -> NDArray[Any]:
    """Return torch's `(n, 1, h, w)` as `(n, h, w)`, `(n, 3, h, w)` as `(n, h, w, 3)`, others unchanged."""
    if images.ndim == 4 and images.shape[3] != 3:
        if images.shape[1] == 1:
            return images[:, 0]
        if images.shape[1] == 3:
            return images.transpose(0, 2, 3, 1)
    return images


def _check_labels(name: str, labels: Any, copy: bool) -> NDArray[np.uint8]:
    array = _as_numpy(name, labels)
    if array.ndim != 1:
        hint = "; of one-hot rows take labels.argmax(1)" if array.ndim == 2 else ""
        raise DataError(f"{name} must be of shape (n,), not {array.shape}{hint}")
    if not len(array):
        raise DataError(f"{name} is empty: there must be at least one label")
    if array.dtype.kind not in "iu":
        raise DataError(f"{name} must be integers, not {array.dtype}")
    if array.min() < 0 or array.max() >= MAX_CLASSES:
        raise DataError(f"{name} must be from 0 to 255, not {array.min()} to {array.max()}")
    return np.array(array, np.uint8, order="C") if copy else np.ascontiguousarray(array, np.uint8)


def _as_numpy(name: str, values: Any) -> NDArray[Any]:
    """Convert an array or a tensor on any device to a NumPy array. Raises `DataError`."""
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name} must be an array or a tensor, not this {type(values).__name__}") from None
