"""A data set that the launcher reads while its workers are still importing torch, and hands to rank 0.

Reading takes a third of a second and importing more than one: side by side the first is free, at the start
and after every restart. What is handed over is a piece of memory, not a copy of it.
"""

import contextlib
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe
from typing import Any, BinaryIO, Self

import numpy as np
from rich.console import Console

from ..config import Run
from ..errors import DataError, WorkerLost, described, tidy_terminal
from .datasets import Dataset, load
from .locate import NotFoundError
from .progress import DataProgress

_CLOSING_SECONDS = 1.0  # between two pieces of a download


def read(options: Run, console: Console, stopped: Callable[[], bool] = lambda: False) -> Dataset:
    """A run's data set, with a bar on the console for what takes long. Raises `DataError`, and
    `Interrupted` if `stopped()` becomes true meanwhile."""
    with DataProgress(console, stopped) as progress:
        try:
            return load(
                options.dataset,
                options.data,
                seed=options.data_seed,
                train_size=options.train_size,
                test_size=options.test_size,
                progress=progress,
            )
        except NotFoundError as error:
            hint = "give --data DIR, or train on drawn digits: --dataset generated"
            raise DataError(f"{error}; {hint}") from None


class Prefetcher:
    """In the launcher: calls `read` at once, in a thread, and tells each group's rank 0 what came of it.

    `read(stopped)` should end soon when `stopped()` is true: nobody wants the data any more.
    """

    def __init__(self, read: Callable[[Callable[[], bool]], Dataset]) -> None:
        self._closing = threading.Event()
        self._read, self._memory = read, _memory()
        self._news: Any = None  # what a rank 0 is sent, once it is known
        self._waiting: list[Connection] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody will ask any more. A download under way is given up, and tidied away if it hears of that
        in time."""
        self._closing.set()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            tidy_terminal(sys.stdout, cursor=True)
        else:
            self._memory.close()

    def hand(self) -> "PrefetchedData":
        """For the rank 0 of one more group."""
        theirs, ours = Pipe(duplex=False)
        with self._lock:
            if self._news is None:
                self._waiting.append(ours)
            else:
                _send(ours, self._news)
        return PrefetchedData(reduction.DupFd(self._memory.fileno()), theirs)

    def _work(self) -> None:
        try:
            news: Any = self._put(self._read(self._closing.is_set))
        except Exception as error:
            news = described(error)
        with self._lock:
            self._news = news
            for one in self._waiting:
                _send(one, news)

    def _put(self, dataset: Dataset) -> tuple[Dataset, list[tuple[int, ...]]]:
        """Write the arrays to the shared memory; the rest of the data set, and the shapes."""
        for array in dataset.arrays().values():
            self._memory.write(array.data)
        self._memory.flush()
        nothing = dict.fromkeys(dataset.arrays(), np.empty(0, np.uint8))
        return replace(dataset, **nothing), [array.shape for array in dataset.arrays().values()]


class PrefetchedData:
    """In a worker's arguments: where rank 0 finds the data set."""

    def __init__(self, memory: Any, news: Connection) -> None:
        self._memory, self._news = memory, news

    def take(self) -> Dataset:
        """The data set, when the launcher has it. Raises what went wrong there."""
        try:
            news = self._news.recv()
        except EOFError:
            raise WorkerLost("the launcher ended before it had the data") from None
        if isinstance(news[0], type):
            kind, text = news
            raise kind(text)
        dataset, shapes = news
        descriptor = self._memory.detach()
        size = os.fstat(descriptor).st_size
        content = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)  # ours to write to, in theory
        os.close(descriptor)
        arrays, start = {}, 0
        for role, shape in zip(dataset.arrays(), shapes, strict=True):
            count = int(np.prod(shape))
            arrays[role] = np.frombuffer(content, np.uint8, count, start).reshape(shape)
            start += count
        return replace(dataset, **arrays)


def _memory() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dmnist"), "r+b")
    return tempfile.TemporaryFile()


def _send(connection: Connection, news: Any) -> None:
    with contextlib.suppress(OSError):  # that group has gone
        connection.send(news)
    connection.close()
