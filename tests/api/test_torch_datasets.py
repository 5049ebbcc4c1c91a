"""torch's `Dataset`s: read once into arrays, or refused in one line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from distributed_mnist import evaluate, from_arrays, train
from distributed_mnist.api.torch_datasets import read_pair
from distributed_mnist.data import datasets
from distributed_mnist.errors import DataError, DmnistError, UsageError

GIVEN = datasets.load("generated", Path(), train_size=64, test_size=32)


class Vision(Dataset[Any]):
    """As torchvision's classes: PIL images unless a transform changes them, and integers."""

    classes = [f"{digit} - {name}" for digit, name in enumerate("abcdefghij")]  # noqa: RUF012

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[Any], transform: Any = None) -> None:
        self.data, self.targets, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.data[index])
        return self.transform(image) if self.transform else image, self.targets[index]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """As torchvision's `ToTensor`."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.float().div(255)


def vision(transform: Any = None) -> tuple[Vision, Vision]:
    return (
        Vision(GIVEN.train_images, GIVEN.train_labels, transform),
        Vision(GIVEN.test_images, GIVEN.test_labels, transform),
    )


TRANSFORMS: dict[str, Callable[[Image.Image], Any]] = {
    "ToTensor": to_tensor,
    "float64": lambda image: np.array(image) / 255,
    "uint8": lambda image: torch.from_numpy(np.array(image)),
    "int64": lambda image: np.array(image, np.int64)[:, :, None],
}


@pytest.mark.parametrize("transform", [None, *TRANSFORMS.values()], ids=["PIL", *TRANSFORMS])
def test_values_are_the_same_in_every_form(transform: Any) -> None:
    read = read_pair(vision(transform))
    for role, array in GIVEN.arrays().items():
        np.testing.assert_array_equal(read.arrays()[role], array)
    assert read.class_names == tuple(Vision.classes)


def test_colour_of_planes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    labels = np.arange(4)
    for transform in (None, to_tensor):
        read = read_pair([Vision(images, labels, transform), Vision(images, labels, transform)])
        np.testing.assert_array_equal(read.train_images, images)


def test_training_gives_the_weights_of_the_arrays(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "linear", "steps": 3, "batch_size": 16}
    arrays = from_arrays(**GIVEN.arrays(), class_names=Vision.classes)
    expected = train(**settings, dataset=arrays, out=tmp_path / "arrays")
    result = train(**settings, dataset=vision(to_tensor), out=tmp_path / "datasets", nproc=2)
    assert result.weights_sha256 == expected.weights_sha256
    assert result.data_sha256 == expected.data_sha256
    test = Vision(GIVEN.test_images[1:], GIVEN.test_labels[1:])
    alone = evaluate(result, test)
    assert alone.images == 31 and evaluate(result, vision()).accuracy == result.accuracy


def test_random_split_makes_a_pair() -> None:
    read = read_pair(random_split(vision()[0], [0.75, 0.25]))
    assert (len(read.train_images), len(read.test_images)) == (48, 16)
    assert read.class_names == tuple(Vision.classes)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


class Nameless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return None


def one(image: Any, label: Any = 0) -> Any:
    class Same(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return (image, label) if label is not None else image

    return Same()


def noisy(image: Image.Image) -> torch.Tensor:
    return torch.rand(1, 28, 28)


X = np.zeros((28, 28), np.uint8)
GOOD = one(X)
WRONG: dict[str, tuple[Any, str]] = {
    "loader": (DataLoader(GOOD), r"the training data is a DataLoader: pass its dataset \(loader.dataset\)"),
    "iterable": (Endless(), "the training data must be a torch Dataset with a length, not a Endless"),
    "no length": (Nameless(), "the training data has no length: its class Nameless needs __len__"),
    "number": (5, "the training data must be a torch Dataset with a length, not a int"),
    "empty": (TensorDataset(torch.zeros(0, 28, 28), torch.zeros(0)), "the training data is empty"),
    "augmented": (
        Vision(GIVEN.train_images, GIVEN.train_labels, noisy),
        "sample 0 differs each time it is",
    ),
    "no label": (one(X, None), r"sample 0 must be \(image, label\), not a ndarray"),
    "float label": (
        TensorDataset(torch.zeros(2, 28, 28), torch.zeros(2)),
        "label must be an integer, not tensor",
    ),
    "one-hot label": (one(X, torch.eye(10)[0]), "label must be an integer, not tensor"),
    "negative label": (one(X, -1), "label must not be -1"),
    "normalised": (one(torch.full((1, 28, 28), -0.4)), "from -0.4 to -0.4; do not normalise them"),
    "0 to 255 as floats": (one(torch.full((28, 28), 255.0)), "floats from 0 to 1, not float32 from 255 to"),
    "NaN": (one(torch.full((28, 28), torch.nan)), "not float32 from nan"),
    "bool": (one(torch.zeros(28, 28, dtype=torch.bool)), "not bool"),
    "sparse": (one(torch.zeros(28, 28).to_sparse()), "sample 0: its image cannot be read: can't convert"),
    "words": (one(np.zeros((28, 28), "U3")), "not <U3"),
    "mode": (one(Image.new("RGBA", (28, 28))), "a picture of mode RGBA: convert it to L or RGB"),
    "text": (one("a.png"), "its image must be a PIL image, or pixels .*, not a str"),
    "flat": (one(torch.zeros(784)), r"its image must be .*, not of shape \(784,\)"),
    "sizes": (
        torch.utils.data.ConcatDataset([GOOD, one(np.zeros((20, 28), np.uint8))]),
        r"sample 3 has shape \(20, 28\), sample 0 has \(28, 28\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_in_one_line(name: str) -> None:
    dataset, told = WRONG[name]
    with pytest.raises(DmnistError, match=told) as caught:
        train(dataset=(dataset, GOOD))
    assert isinstance(caught.value, UsageError | DataError) and str(caught.value).isprintable()
