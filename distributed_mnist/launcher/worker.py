"""A worker of our own launcher, from its fork to the code it ends with."""

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
from ..errors import WorkerLost, tidy_terminal
from .signals import SIGNALS

Target = str
"""`module:function`, so that this process need not import what only the others need. The function is called
as `function(placement, listener, argument)`, or with a fourth argument for what the launcher hands to rank
0, and returns the process's exit code."""

_ORPHAN_SECONDS = 10.0  # to stop at a common step and save, once the launcher is gone


def work(
    target: Target,
    placement: Placement,
    listener: socket.socket | None,
    output: Connection | None,
    alive: Connection,
    argument: Any,
    handed: Any = None,
) -> None:
    """A worker's life. `alive` is the end of a pipe whose other end the launcher holds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a server that others started may let them through
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    if output is not None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    more = () if handed is None else (handed,)
    code = resolve(target)(placement, listener, argument, *more)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that failed must not wait in a finaliser for a peer that is gone


def resolve(target: Target) -> Callable[..., int]:
    """The function that a target names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def print_with_rank(reader: Connection, rank: int) -> None:
    """In the launcher: pass on what a worker prints, line by line, until it ends."""
    with os.fdopen(os.dup(reader.fileno()), "r", errors="replace") as lines:
        for line in lines:
            tidy_terminal(sys.stderr)
            sys.stderr.write(f"[rank {rank}] {line.rstrip()}\n")
            sys.stderr.flush()


def _end_with_launcher(alive: Connection) -> None:
    """When the launcher dies, however it dies, so do we."""
    with contextlib.suppress(OSError, EOFError):
        alive.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_SECONDS)
    os._exit(WorkerLost.exit_code)
