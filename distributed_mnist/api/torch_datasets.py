"""Read torch's `Dataset`s into arrays, once, before training.

A run draws its own order and its own augmentation, by keys, so it needs fixed images instead of an object
whose samples may differ at each read.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from ..data.arrays import from_arrays
from ..data.datasets import Dataset
from ..errors import DataError, UsageError

TorchData = TorchDataset[Any] | Sequence[TorchDataset[Any]]
"""One data set for testing, or a pair for training and testing."""
_READ_TWICE = 8  # samples, to find random augmentation


def is_torch(value: Any) -> bool:
    """Return whether this is one of torch's data sets or loaders, or a pair with one."""
    values = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    return any(isinstance(one, TorchDataset | DataLoader) for one in values)


def read_pair(value: Any, *, test_only: bool = False) -> Dataset:
    """Return the data set in a pair of torch's `Dataset`s, for training and for testing.

    With `test_only`, it may be one `Dataset` of test images. Raises UsageError for anything else, and
    DataError for samples that cannot be used.
    """
    if isinstance(value, TorchDataset | DataLoader):
        if not test_only:
            raise UsageError(
                "dataset is one torch Dataset, without test images: pass a pair (train, test); "
                "torch.utils.data.random_split(dataset, [0.9, 0.1]) makes one"
            )
        value = value, value
    train, test = value
    test_arrays = _read("the test data", test)
    train_arrays = test_arrays if test_only and train is test else _read("the training data", train)
    highest = int(max(train_arrays[1].max(), test_arrays[1].max()))
    names = _class_names(train)
    if not names or highest >= len(names):
        # A test part may lack class 0.
        names = list(map(str, range(highest + 1))) if test_only else None
    return from_arrays(*train_arrays, *test_arrays, class_names=names)


def _read(what: str, dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all images and labels. Raises UsageError or DataError, which begins with `what`."""
    if isinstance(dataset, DataLoader):
        raise UsageError(f"{what} is a DataLoader: pass its dataset (loader.dataset)")
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, TorchDataset):
        raise UsageError(f"{what} must be a torch Dataset with a length, not a {type(dataset).__name__}")
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise UsageError(
            f"{what} has no length: its class {type(dataset).__name__} needs __len__"
        ) from None
    if not count:
        raise DataError(f"{what} is empty: there must be at least one sample")
    for i in sorted({count * n // _READ_TWICE for n in range(_READ_TWICE)}):
        first, second = (_sample(f"{what}, sample {i}", dataset[i]) for _ in range(2))
        if first[1] != second[1] or not np.array_equal(first[0], second[0]):
            raise DataError(
                f"{what}, sample {i} differs each time it is read: leave out random transforms, and "
                "augment with shift, rotate and scale"
            )
    labels = np.empty(count, np.int64)
    images = np.empty(0, np.uint8)
    for i in range(count):
        image, labels[i] = _sample(f"{what}, sample {i}", dataset[i])
        if i == 0:
            images = np.empty((count, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise DataError(f"{what}, sample {i} has shape {image.shape}, sample 0 has {images.shape[1:]}")
        images[i] = image
    return images, labels


def _sample(where: str, sample: Any) -> tuple[NDArray[np.uint8], int]:
    """Return a sample's pixels, `(h, w)` or `(h, w, 3)`, and its label. Raises DataError."""
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise DataError(f"{where} must be (image, label), not a {type(sample).__name__}")
    image, label = sample[:2]
    try:
        number = operator.index(label)
    except (TypeError, RuntimeError, ValueError):
        raise DataError(f"{where}: its label must be an integer, not {label!r:.60}") from None
    if not 0 <= number < 1 << 31:
        raise DataError(f"{where}: its label must not be {number}")
    return _pixels(where, image), number


def _pixels(where: str, image: Any) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        if image.mode not in ("L", "RGB"):
            raise DataError(f"{where}: a picture of mode {image.mode}: convert it to L or RGB")
        return np.asarray(image)
    wanted = f"{where}: its image must be a PIL image, or pixels (h, w), (1, h, w) or (3, h, w)"
    if not isinstance(image, torch.Tensor | np.ndarray):
        raise DataError(f"{wanted}, not a {type(image).__name__}")
    values = _as_numpy(where, image) if isinstance(image, torch.Tensor) else image
    if values.ndim == 3 and values.shape[2] != 3 and values.shape[0] in (1, 3):
        values = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)) or not values.size:
        raise DataError(f"{wanted}, not of shape {tuple(image.shape)}")
    if values.dtype == np.uint8:
        return values
    is_float = values.dtype.kind == "f"
    ranges = "pixels must be integers from 0 to 255, or floats from 0 to 1"
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where}: {ranges}, not {values.dtype}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (1 if is_float else 255)):  # also NaN
        hint = "; do not normalise them, because training does" if is_float and low < 0 else ""
        raise DataError(f"{where}: {ranges}, not {values.dtype} from {low:g} to {high:g}{hint}")
    # As torch rounds, so that ToTensor and back changes nothing.
    return (
        (values.astype(np.float32) * 255).round().astype(np.uint8) if is_float else values.astype(np.uint8)
    )


def _as_numpy(where: str, image: torch.Tensor) -> NDArray[Any]:
    try:
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
    except (TypeError, RuntimeError) as error:  # a sparse tensor, or one without values
        raise DataError(f"{where}: its image cannot be read: {error}") from None


def _class_names(dataset: Any) -> list[str] | None:
    """Return the names in the attribute `classes`, which torchvision's data sets have."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        return None
    return list(names) if len(set(names)) == len(names) > 0 else None
