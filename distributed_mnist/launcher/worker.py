"""Run one worker of our own launcher, from its fork to its exit code."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..common.placement import Placement
from ..common.streams import prepare_streams, try_to_write
from ..errors import WorkerLost, tidy_terminal
from .signals import SIGNALS

Target = str
"""`module:function`, as text so that the launcher need not import what only workers need. The function
is called as `function(placement, listener, argument)`, on rank 0 perhaps with a fourth argument (see
`spawn.Task`), and returns the process's exit code."""

FINISHED = 64
"""The exit code of a worker whose target has returned 0. A model or a library that ends the process with 0
has not finished the work."""
_ORPHAN_SECONDS = 10.0  # for a worker to stop at a sync point and save, after the launcher has ended


def run_worker(
    target: Target,
    placement: Placement,
    listener: socket.socket | None,
    output: Connection | None,
    alive: Connection,
    argument: Any,
    rank_zero_argument: Any = None,
) -> None:
    """Call the target and exit with its code, or `FINISHED` instead of 0.

    `output` replaces standard output and standard error. `alive` is one end of a pipe; the launcher holds
    the other end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # another program's fork server may not block them
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    prepare_streams()
    if output is not None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    more = () if rank_zero_argument is None else (rank_zero_argument,)
    code = resolve(target)(placement, listener, argument, *more)
    try_to_write(sys.stdout, "")
    try_to_write(sys.stderr, "")
    os._exit(code or FINISHED)  # a process that failed must not wait in a finalizer for a peer that is gone


def resolve(target: Target) -> Callable[..., int]:
    """Import and return the function that a target names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def print_with_rank(reader: Connection, rank: int) -> None:
    """In the launcher: print each line of a worker's output with its rank in front, until it ends."""
    with os.fdopen(os.dup(reader.fileno()), "r", errors="replace") as lines:
        for line in lines:
            tidy_terminal(sys.stderr)
            try_to_write(sys.stderr, f"[rank {rank}] {line.rstrip()}\n")


def _end_with_launcher(alive: Connection) -> None:
    """Stop this process when the launcher has ended, for whatever reason: the pipe then closes."""
    with contextlib.suppress(OSError, EOFError):
        alive.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_SECONDS)
    os._exit(WorkerLost.exit_code)
