"""Data read by the launcher and handed to rank 0: the same data each time, and what goes wrong is told."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable
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
from distributed_mnist.data.prefetch import PrefetchedData, Prefetcher, read
from distributed_mnist.data.progress import DataProgress
from distributed_mnist.errors import DataError, DmnistError, WorkerLost

Stopped = Callable[[], bool]


def drawn(stopped: Stopped | None = None) -> Dataset:
    return datasets.load("generated", Path(), train_size=50, test_size=7)


def taken(handed: PrefetchedData) -> tuple[dict[Any, Any], str]:
    """In another process: the arrays, and what else there is."""
    dataset = handed.take()
    for array in dataset.arrays().values():
        array.flat[0] ^= 1  # a copy of one's own
    return dataset.arrays(), dataset.name


def _answer(writer: Any, handed: PrefetchedData) -> None:
    try:
        writer.send(taken(handed))
    except DmnistError as error:
        writer.send(error)
    writer.close()


def in_a_worker(supply: Prefetcher) -> Any:
    """What a worker that is handed the data makes of it."""
    context = server()
    reader, writer = context.Pipe(duplex=False)
    worker = context.Process(target=_answer, args=(writer, supply.hand()))
    worker.start()
    writer.close()
    with reader:
        answer = reader.recv() if reader.poll(60) else "nothing came"
    worker.join(60)
    return answer


def test_every_worker_gets_what_was_read_once() -> None:
    calls: list[int] = []

    def count(stopped: Stopped) -> Dataset:
        calls.append(1)
        return drawn()

    with Prefetcher(count) as supply:
        for _ in range(2):  # the second after a restart, the first one's changes being its own
            arrays, name = in_a_worker(supply)
            assert name == "generated"
            for role, array in drawn().arrays().items():
                expected = array.copy()
                expected.flat[0] ^= 1
                np.testing.assert_array_equal(arrays[role], expected)
    assert len(calls) == 1


def test_a_worker_that_comes_early_waits() -> None:
    go = threading.Event()

    def late(stopped: Stopped) -> Dataset:
        assert go.wait(60)
        return drawn()

    with Prefetcher(late) as supply:
        threading.Timer(0.2, go.set).start()
        arrays, _ = in_a_worker(supply)
    assert arrays["train_images"].shape == (50, 28, 28)


@pytest.mark.parametrize(
    ("error", "kind"), [(DataError("there is none"), DataError), (ValueError("a bug"), DmnistError)]
)
def test_what_went_wrong_is_raised_in_the_worker(error: Exception, kind: type[Exception]) -> None:
    def fail(stopped: Stopped) -> Dataset:
        raise error

    with Prefetcher(fail) as supply:
        answer = in_a_worker(supply)
    assert isinstance(answer, kind)
    assert str(error) in str(answer)


def test_a_launcher_that_ended_is_named() -> None:
    theirs, ours = Pipe(duplex=False)
    ours.close()
    with theirs, pytest.raises(WorkerLost, match="the launcher ended"):
        PrefetchedData(None, theirs).take()


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_stays_open() -> None:
    before = _open_files()
    with Prefetcher(drawn) as supply:
        in_a_worker(supply)
    assert _open_files() <= before


def test_read_says_what_to_do_where_there_is_none(tmp_path: Path) -> None:
    options = dataclasses.replace(Run(), dataset="idx", data=tmp_path / "nothing")
    with pytest.raises(DataError):
        read(options, Console(quiet=True))


def test_what_nobody_wants_any_more_is_given_up_and_tidied_away(tmp_path: Path) -> None:
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
