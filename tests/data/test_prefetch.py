"""Data that the launcher reads for rank 0: the same each time, and errors reach rank 0."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import server
from rich.console import Console

from distributed_mnist.common.atomic_write import written_aside
from distributed_mnist.config import Run
from distributed_mnist.data import datasets
from distributed_mnist.data.datasets import Dataset
from distributed_mnist.data.download_progress import DataProgress
from distributed_mnist.data.prefetch import PrefetchedData, Prefetcher, read
from distributed_mnist.errors import DataError, DmnistError, WorkerLost

Stopped = Callable[[], bool]


def drawn(stopped: Stopped | None = None) -> Dataset:
    return datasets.load("generated", Path(), train_size=50, test_size=7)


def received(prefetched: PrefetchedData) -> tuple[dict[Any, Any], str]:
    """Receive the data, change it, and return the arrays and the name. Runs in another process."""
    dataset = prefetched.receive()
    for array in dataset.arrays().values():
        array.flat[0] ^= 1  # must not affect others
    return dataset.arrays(), dataset.name


def _answer(writer: Any, prefetched: PrefetchedData) -> None:
    try:
        writer.send(received(prefetched))
    except DmnistError as error:
        writer.send(error)
    writer.close()


def in_a_worker(prefetcher: Prefetcher) -> Any:
    """Return what a worker process receives."""
    context = server()
    reader, writer = context.Pipe(duplex=False)
    worker = context.Process(target=_answer, args=(writer, prefetcher.for_rank_zero()))
    worker.start()
    writer.close()
    with reader:
        answer = reader.recv() if reader.poll(60) else "no answer"
    worker.join(60)
    return answer


def test_data_is_read_once_for_all_restarts() -> None:
    calls: list[int] = []

    def count(stopped: Stopped) -> Dataset:
        calls.append(1)
        return drawn()

    with Prefetcher(count) as prefetcher:
        for _ in range(2):  # the second call is a restart; changes by the first worker must not be visible
            arrays, name = in_a_worker(prefetcher)
            assert name == "generated"
            for role, array in drawn().arrays().items():
                expected = array.copy()
                expected.flat[0] ^= 1
                np.testing.assert_array_equal(arrays[role], expected)
    assert len(calls) == 1


def test_a_worker_inherits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not ask the launcher for it, which would print a traceback if the worker died meanwhile."""
    monkeypatch.setattr(resource_sharer, "DupFd", None)  # multiprocessing's way to be asked
    with Prefetcher(drawn) as prefetcher:
        assert in_a_worker(prefetcher)[1] == "generated"


def test_an_early_worker_waits() -> None:
    go = threading.Event()

    def late(stopped: Stopped) -> Dataset:
        assert go.wait(60)
        return drawn()

    with Prefetcher(late) as prefetcher:
        threading.Timer(0.2, go.set).start()
        arrays, _ = in_a_worker(prefetcher)
    assert arrays["train_images"].shape == (50, 28, 28)


@pytest.mark.parametrize(
    ("error", "kind"), [(DataError("there is none"), DataError), (ValueError("a bug"), DmnistError)]
)
def test_errors_are_raised_in_the_worker(error: Exception, kind: type[Exception]) -> None:
    def fail(stopped: Stopped) -> Dataset:
        raise error

    with Prefetcher(fail) as prefetcher:
        answer = in_a_worker(prefetcher)
    assert isinstance(answer, kind)
    assert str(error) in str(answer)


def test_a_launcher_that_ended() -> None:
    receiver, sender = Pipe(duplex=False)
    sender.close()
    with receiver, pytest.raises(WorkerLost, match="the launcher ended"):
        PrefetchedData(None, receiver).receive()


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_file_stays_open() -> None:
    before = _open_files()
    with Prefetcher(drawn) as prefetcher:
        in_a_worker(prefetcher)
    assert _open_files() <= before


def test_read_suggests_a_flag_if_data_is_missing(tmp_path: Path) -> None:
    options = dataclasses.replace(Run(), dataset="idx", data=tmp_path / "nothing")
    with pytest.raises(DataError, match="give --data DIR"):
        read(options, Console(quiet=True))


def test_an_unneeded_download_is_stopped_and_removed(tmp_path: Path) -> None:
    begun = threading.Event()

    def download(stopped: Stopped) -> Dataset:
        with (
            DataProgress(Console(file=io.StringIO()), stopped) as progress,
            written_aside(tmp_path / "data"),
        ):
            while True:
                begun.set()
                time.sleep(0.01)
                progress("data", 1, None)

    with Prefetcher(download):
        assert begun.wait(60)
    assert list(tmp_path.iterdir()) == []
