"""One rank reads the data, all ranks have it: rank 0's copy is broadcast and every copy is checked.

No other rank touches a file or the network, so there is no download race and no need for a file system
that the hosts share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.digest import digest
from ..distributed.world import World
from ..errors import DataError
from .datasets import Dataset
from .split import Split

_DATA_SECONDS = 1800.0  # rank 0 may be downloading, or drawing millions of digits, while the others wait


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
    """Digest of all images and labels."""

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says about its data."""
        names = ("name", "mean", "std", "sha256")
        return {"class_names": list(self.class_names), **{name: getattr(self, name) for name in names}}


def broadcast_dataset(world: World, load: Callable[[], Dataset]) -> Data:
    """`load()` on rank 0 only; the same `Data` on every rank. All raise what `load` raises there.

    Raises `DataError` if a copy arrived different.
    """
    world.status.enter("loading the data", patience=_DATA_SECONDS)
    loaded: list[Dataset] = []

    def describe() -> tuple[dict[str, Any], list[tuple[int, ...]], str]:
        dataset = load()
        loaded.append(dataset)
        meta = {key: getattr(dataset, key) for key in ("name", "class_names", "mean", "std", "source")}
        return meta, [array.shape for array in _arrays(dataset)], digest(_arrays(dataset))

    meta, shapes, sha256 = world.on_rank_zero(describe)
    mine = _arrays(loaded[0]) if loaded else [np.empty(shape, np.uint8) for shape in shapes]
    tensors = [world.broadcast_(torch.from_numpy(array).to(world.device)) for array in mine]
    wrong = world.differing(sha256 if loaded else digest([tensor.cpu().numpy() for tensor in tensors]))
    if wrong:
        raise DataError(f"rank {wrong[0]} received other data than was sent: check its memory and network")
    world.status.enter("preparing")
    train_images, train_labels, test_images, test_labels = tensors
    return Data(Split(train_images, train_labels), Split(test_images, test_labels), sha256=sha256, **meta)


def _arrays(dataset: Dataset) -> list[NDArray[np.uint8]]:
    return [dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels]
