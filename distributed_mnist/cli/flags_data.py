"""The flags of `dmnist data`: see `flags`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..config import require
from ..data.catalog import require_name
from .flags_train import CommonFlags


@dataclass(frozen=True)
class Fetch(CommonFlags):
    """Download a data set, verified, into a folder."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to put it in, laid out as torchvision does."""
    mirror: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Address to download from instead of the published ones, a folder with the files; may be repeated."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for a name that is no data set, or that has no files."""
        require_name(self.dataset, files=True)


@dataclass(frozen=True)
class Check(CommonFlags):
    """Say what is in a folder of data: every file, its rows, its checksum, and whether it is sound."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to look in."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for a name that is no data set, or that has no files."""
        require_name(self.dataset, files=True)


@dataclass(frozen=True)
class Generate(CommonFlags):
    """Draw digits and write them as four IDX files, for --dataset idx here or for any other program."""

    out: tyro.conf.Positional[Path]
    """Folder to write to."""
    train_size: int = 60_000
    """Training images to draw."""
    test_size: int = 10_000
    """Test images to draw."""
    data_seed: int = 0
    """Seed of the drawn digits: the same seed draws the same digits everywhere."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for name in ("train_size", "test_size"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)
