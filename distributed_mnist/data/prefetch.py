"""Read the data set in the launcher while the workers import torch, then pass it to rank 0.

Reading takes a third of a second, and importing more than one second. In parallel, reading costs no time,
at the start and after every restart. The data is passed as shared memory, not as a copy.
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
from ..errors import DataError, WorkerLost, described, recreate, tidy_terminal
from .datasets import Dataset, load
from .download_progress import DataProgress
from .locate import NotFoundError

_CLOSING_SECONDS = 1.0  # enough to reach the next chunk of a download, where it can be stopped


def read(options: Run, console: Console, stopped: Callable[[], bool] = lambda: False) -> Dataset:
    """Load a run's data set, with a progress bar on the console for slow parts.

    Raises `DataError`, and `Interrupted` if `stopped()` becomes true in the meantime.
    """
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
            hint = "give --data DIR, or train on generated digits: --dataset generated"
            raise DataError(f"{error}; {hint}") from None


class Prefetcher:
    """In the launcher: read the data set once, in a thread, for rank 0 of every group of workers.

    The thread calls `read(stopped)` immediately. `read` should end soon after `stopped()` becomes true,
    because the data is no longer needed.
    """

    def __init__(self, read: Callable[[Callable[[], bool]], Dataset]) -> None:
        self._closing = threading.Event()
        self._read, self._memory = read, _shared_memory()
        self._message: Any = None  # for rank 0: the data set or an error, once the thread has ended
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading. A download deletes its temporary file if it notices the stop in time."""
        self._closing.set()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            tidy_terminal(sys.stdout, cursor=True)
        else:
            self._memory.close()

    def for_rank_zero(self) -> "PrefetchedData":
        """Return the object with which rank 0 of a new group receives the data."""
        receiver, sender = Pipe(duplex=False)
        threading.Thread(target=self._send_when_read, args=(sender,), daemon=True).start()
        return PrefetchedData(self._memory, receiver)

    def _run(self) -> None:
        try:
            self._message = self._share(self._read(self._closing.is_set))
        except Exception as error:
            self._message = described(error)

    def _send_when_read(self, connection: Connection) -> None:
        self._thread.join()
        with contextlib.suppress(OSError):  # the group has ended
            connection.send(self._message)
        connection.close()

    def _share(self, dataset: Dataset) -> tuple[Dataset, list[tuple[int, ...]]]:
        """Write the arrays to the shared memory. Return the data set without arrays, and their shapes."""
        for array in dataset.arrays().values():
            self._memory.write(array.data)
        self._memory.flush()
        empty = dict.fromkeys(dataset.arrays(), np.empty(0, np.uint8))
        return replace(dataset, **empty), [array.shape for array in dataset.arrays().values()]


class PrefetchedData:
    """In rank 0's arguments: receives the data set from the launcher's `Prefetcher`."""

    def __init__(self, memory: Any, receiver: Connection) -> None:
        self._memory, self._receiver = memory, receiver

    def __reduce__(self) -> Any:
        """In the launcher, when it starts the worker, which inherits the memory's descriptor.

        Otherwise the worker would have to ask for it, and the launcher would print a traceback if the
        worker died meanwhile.
        """
        return PrefetchedData, (reduction.DupFd(self._memory.fileno()), self._receiver)

    def receive(self) -> Dataset:
        """Wait for the data set and return it. Raises the error that occurred in the launcher, if any."""
        try:
            message = self._receiver.recv()
        except EOFError:
            raise WorkerLost("the launcher ended before it had the data") from None
        if isinstance(message[0], str):
            raise recreate(*message)
        dataset, shapes = message
        descriptor = self._memory.detach()
        size = os.fstat(descriptor).st_size
        # Copy on write, because the arrays of a `Dataset` are writable.
        content = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
        os.close(descriptor)
        arrays, start = {}, 0
        for role, shape in zip(dataset.arrays(), shapes, strict=True):
            count = int(np.prod(shape))
            arrays[role] = np.frombuffer(content, np.uint8, count, start).reshape(shape)
            start += count
        return replace(dataset, **arrays)


def _shared_memory() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dmnist"), "r+b")
    return tempfile.TemporaryFile()
