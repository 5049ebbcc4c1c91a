"""What tests of processes share: an environment without launchers, and small data sets."""

import os
import signal
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

for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:  # under nohup: what tests start would ignore it too
        signal.signal(_number, lambda *_: None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the same after `&` in a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    *("launcher/test_restart", "launchers/test_hosts", "launchers/test_slurm", "documents/test_notebook"),
    *("documents/test_documented_commands", "training/test_resume", "export/test_export"),
    *("verify/test_tree", "launchers/test_elastic", "verify/test_chaos", "bench/test_bench"),
    *("training/test_same_answer", "gradients/test_tree_ranks", "deploy/test_manifests"),
    *("reporting/test_output", "distributed/test_socket_collectives", "runs/test_storage"),
    *("launchers/test_strangers", "api/test_functions", "distributed/test_watchdog"),
    *("cli/test_original_script", "inference/test_ensemble", "gradients/test_per_shard"),
    *("api/test_interrupts", "api/test_on_event", "cli/test_stop", "cli/test_dry_run", "test_packaging"),
)
"""The files that take longest, 20 to 100 seconds, the longest first (see `pytest --durations 100`)."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from this process and from all that it starts, except with `-m gpu` (`make test-gpu`)."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first: pytest-xdist hands files out in this order, and a long one at the end
    would leave the other cores idle."""
    place = {config.rootpath / "tests" / f"{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


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
