"""Read the data on rank 0, broadcast it to all ranks, and check every copy.

No other rank uses files or the network, so downloads cannot race, and the hosts need no shared file system.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.digest import digest
from ..config import ImageShape, Recipe
from ..distributed.world import World
from ..errors import DataError
from .datasets import Dataset
from .split import Split

_LOAD_SECONDS = 1800.0  # the other ranks wait while rank 0 downloads, or draws millions of digits


@dataclass(frozen=True)
class Data:
    """A data set on a rank's device."""

    train: Split
    test: Split
    name: str
    class_names: tuple[str, ...]
    mean: float
    std: float
    source: str
    sha256: str
    """SHA-256 of all images and labels."""
    validation: Split | None = None
    """Images that are not trained on, to choose the weights by; None without `--validation`."""

    def with_validation(self, recipe: Recipe) -> "Data":
        """Return the data with the last training images for validation, as many as the recipe says.

        Raises `UsageError` if the recipe leaves none for training.
        """
        count = recipe.validation_images(len(self.train))
        if not count:
            return self
        first = len(self.train) - count
        train = Split(self.train.images[:first], self.train.labels[:first])
        validation = Split(self.train.images[first:], self.train.labels[first:])
        return replace(self, train=train, validation=validation)

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of an image."""
        return self.train.image_shape

    def to_dict(self) -> dict[str, Any]:
        """Return the description of the data that is stored in a checkpoint."""
        names = ("name", "mean", "std", "sha256")
        lists = {"class_names": list(self.class_names), "image_shape": list(self.image_shape)}
        return {**lists, **{name: getattr(self, name) for name in names}}


_Description = tuple[dict[str, Any], list[tuple[int, ...]], str]
"""What rank 0 tells the other ranks before it sends the arrays: fields of `Data`, shapes, and SHA-256."""


def broadcast_dataset(world: World, load: Callable[[], Dataset]) -> Data:
    """Call `load()` on rank 0 only and return the same `Data` on every rank.

    Every rank raises what `load` raises on rank 0, or `DataError` if a rank received different data.
    """
    world.status.enter("loading the data", patience=_LOAD_SECONDS)
    loaded: list[NDArray[np.uint8]] = []  # stays empty on the other ranks

    def load_and_describe() -> _Description:
        dataset = load()
        loaded.extend(dataset.arrays().values())
        fields = {key: getattr(dataset, key) for key in ("name", "class_names", "mean", "std", "source")}
        return fields, [array.shape for array in loaded], digest(loaded)

    fields, shapes, sha256 = world.on_rank_zero(load_and_describe, _Description)
    fields["class_names"] = tuple(fields["class_names"])  # a message has lists only
    arrays = loaded or [np.empty(shape, np.uint8) for shape in shapes]
    tensors = [world.broadcast_(torch.from_numpy(array).to(world.device)) for array in arrays]
    received = sha256 if loaded else digest([tensor.cpu().numpy() for tensor in tensors])
    if wrong_ranks := world.differing(received):
        raise DataError(
            f"rank {wrong_ranks[0]} received data that differs from what was sent: "
            "check its memory and network"
        )
    world.status.enter("preparing")
    train_images, train_labels, test_images, test_labels = tensors
    return Data(Split(train_images, train_labels), Split(test_images, test_labels), sha256=sha256, **fields)
