"""Flags of the `dmnist data` commands. See `flags_train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import require, require_count
from ..data.catalog import require_name
from ..errors import UsageError
from .flags_train import CommonFlags


@dataclass(frozen=True)
class NamedDataset(CommonFlags):
    """Flags of the commands that use the files of a named data set."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown name, or a data set that has no files."""
        require_name(self.dataset, files=True)


@dataclass(frozen=True)
class Fetch(NamedDataset):
    """Download a data set into a folder and verify it."""

    data: Path = Path("data")
    """Folder to download to. The layout is the same as torchvision's."""
    mirror: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """URL of a folder to download the files from, instead of the published mirrors. May be repeated."""


@dataclass(frozen=True)
class Check(NamedDataset):
    """Check the files of a data set: number of rows, checksums, and whether each file is valid."""

    data: Path = Path("data")
    """Folder to look in."""


@dataclass(frozen=True)
class Import(CommonFlags):
    """Import a data set in another format, and write it as four IDX files for --dataset idx.

    Reads NumPy's .npz (such as Keras' MNIST), CSV (such as Kaggle's), Parquet (such as the Hugging Face
    hub's; needs pyarrow), torchvision's processed/*.pt, CIFAR's files, EMNIST's IDX files, and a folder of
    pictures for each class.
    """

    source: tyro.conf.Positional[Path]
    """File or folder to import. Its content tells the format."""
    data: Path = Path("data")
    """Folder to write to."""
    test: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File or folder with the test images, if they are not in SOURCE."""
    test_fraction: float | None = None
    """Fraction of the training images to take as test images, at random. The choice is always the same."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        fraction = self.test_fraction
        require(fraction is None or 0 < fraction < 1, "test_fraction", "between 0 and 1", self)
        if self.test is not None and self.test_fraction is not None:
            raise UsageError("--test and --test-fraction exclude each other: give one of them")


@dataclass(frozen=True)
class Generate(CommonFlags):
    """Generate digits and write them as four IDX files, for --dataset idx or for other programs."""

    out: tyro.conf.Positional[Path]
    """Folder to write to."""
    train_size: int = 60_000
    """Number of training images to generate."""
    test_size: int = 10_000
    """Number of test images to generate."""
    data_seed: int = 0
    """Seed for the generated digits. The same seed gives the same digits on every machine."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        require_count(self, "train_size", "test_size")
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)
