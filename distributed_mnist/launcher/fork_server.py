"""The server from which our launcher forks its workers: it has imported torch before they start."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

from ..common import environment
from ..errors import LaunchError, reason
from .signals import SIGNALS
from .worker import Target

_LONGEST_FOLDER = 70  # an address of a Unix socket has at most 104 bytes, of which multiprocessing takes 33


def make_context() -> Any:
    """Return multiprocessing's context: a fork server, or fresh interpreters where there is none."""
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def warm_up(*targets: Target) -> None:
    """Start the server that forks the workers, unless it runs already.

    It imports the modules of these targets, and with them torch, while this process continues. Raises
    `LaunchError` if it cannot be started.
    """
    context = make_context()
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([target.partition(":")[0] for target in targets])
        start_server()


def start_server() -> None:
    """Start multiprocessing's fork server, if there is none yet, with our signals blocked.

    Its children inherit this, so a program that forks other processes from it must unblock the signals.
    Raises `LaunchError` if it cannot be started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with environment.for_workers(), _folder_for_sockets():
            resource_tracker.ensure_running()  # unblocks two of the signals
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            forkserver.ensure_running()
    except (OSError, EOFError) as error:
        raise cannot_start(error) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cannot_start(error: OSError | EOFError) -> LaunchError:
    """Return the error for processes that the operating system refuses to start.

    multiprocessing raises `EOFError` if the server that forks them has ended.
    """
    cause = reason(error) if isinstance(error, OSError) else "the server that forks them has ended"
    return LaunchError(f"processes cannot be started: {cause} (see memory, and the limits of `ulimit -a`)")


@contextlib.contextmanager
def _folder_for_sockets() -> Iterator[None]:
    """Make multiprocessing put its socket into a folder that can be written and has a short path.

    It takes the folder for temporary files when it first needs one.
    """
    before = tempfile.tempdir
    try:
        tempfile.tempdir = _choose_folder()
        yield
    finally:
        tempfile.tempdir = before


def _choose_folder() -> str:
    """Return the folder for temporary files, or else another one. Raises `LaunchError` if there is none."""
    folders = ["/tmp", "/var/tmp", "/dev/shm"]
    with contextlib.suppress(OSError):
        folders.insert(0, tempfile.gettempdir())
    for folder in folders:
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise LaunchError(
        "there is no folder for temporary files that can be written and whose path has at most "
        f"{_LONGEST_FOLDER} bytes: set TMPDIR to one"
    )
