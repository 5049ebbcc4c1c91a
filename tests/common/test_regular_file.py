"""A path may lead to something that is no file: nothing waits for it or reads it without end."""

import os
from pathlib import Path

import pytest

from distributed_mnist.common.regular_file import read_regular
from distributed_mnist.config import MNIST_SHAPE
from distributed_mnist.errors import CheckpointError, DataError, UsageError
from distributed_mnist.inference import predict
from distributed_mnist.inference.image_files import read_grey
from distributed_mnist.inference.trained import find_checkpoint
from distributed_mnist.reporting.watch import Tail
from distributed_mnist.runs import record


@pytest.fixture(params=["pipe", "device"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it.png"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


def test_a_checkpoint(endless: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it\.png: not a file$"):
        find_checkpoint(endless)


def test_a_picture(endless: Path) -> None:
    with pytest.raises(DataError, match=r"it\.png: not a file$"):
        read_grey(endless)
    assert list(predict._read_pictures([endless], MNIST_SHAPE, "auto")) == [f"{endless}: not a file"]


def test_the_metrics_of_a_run(endless: Path, tmp_path: Path) -> None:
    endless.rename(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="not a file"):
        record.read(tmp_path)
    with pytest.raises(UsageError, match="not a file"):
        Tail(tmp_path).new_events()


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (2 << 20))
    assert read_regular(path, 2 << 20) == path.read_bytes()
    with pytest.raises(OSError, match="larger than 1 megabytes"):
        read_regular(path, 1 << 20)
    with pytest.raises(OSError, match="not a file"):
        read_regular(tmp_path, 1 << 20)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(CheckpointError, match=r"file: larger than 16,384 megabytes$"):
        find_checkpoint(path)
