"""What tests of processes share: an environment without launchers, and small data sets."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paced
import pytest
import torch
from ranks import environment

from distributed_mnist.data import datasets

TRAIN_SIZE, TEST_SIZE = 1_100, 300

torch.set_num_threads(1)  # as in training; more threads can change the last bits between two calls


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with many slow tests first: pytest-xdist hands files out in this order, and a long one at
    the end would leave the other cores idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def no_launcher() -> Iterator[None]:
    """Tests may run in a job of Slurm or MPI themselves: what they start is no part of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - environment().keys():
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1,100 + 300 generated digits as IDX files, for `--dataset idx`."""
    folder = tmp_path_factory.mktemp("digits")
    drawn = datasets.load("generated", Path(), train_size=TRAIN_SIZE, test_size=TEST_SIZE)
    datasets.write(drawn, folder)
    return folder


@pytest.fixture(scope="session")
def expected(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to in a `paced` run that nothing happens to."""
    return paced.undisturbed(digits, tmp_path_factory.mktemp("undisturbed"))
