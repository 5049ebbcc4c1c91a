"""Errors that a user can fix, their exit codes, and how they are printed.

Each is printed as a single line. Any other exception is reported as an internal error.
`docs/reference/exit-codes.md` lists the codes for scripts.
"""

import errno
import json
import shutil
import sys
import textwrap
import traceback
from typing import TextIO

from .common.placement import ALONE, Placement
from .common.printable import printable, shortened
from .common.streams import try_to_write


class DmnistError(Exception):
    """Base class of all expected errors. `str(error)` is the line that the user sees."""

    exit_code = 1
    on_one_rank = False
    """Whether only some ranks raise it. If not, all ranks raise the same error, and rank 0 prints it."""


class UsageError(DmnistError):
    """A flag, a recipe or a model that cannot be used."""

    exit_code = 2


class DataError(DmnistError):
    """A data set that is missing or damaged, or whose content does not match its name."""

    exit_code = 3


class CheckpointError(DmnistError):
    """A checkpoint that cannot be read, or that is from a different run."""

    exit_code = 4


class LaunchError(DmnistError):
    """Processes that cannot be started, or cannot connect to each other."""

    exit_code = 5
    on_one_rank = True


class OutputError(DmnistError):
    """A run folder that cannot be written, or that is in use."""

    exit_code = 6


class TrainingError(DmnistError):
    """A failure of the training itself: the loss is not finite, or ranks compute different results."""

    exit_code = 7


class WorkerLost(DmnistError):
    """A process of the group died or can no longer be reached."""

    exit_code = 8
    on_one_rank = True


class Hang(WorkerLost):
    """A process of the group, or the whole group, makes no progress."""


class VerificationError(DmnistError):
    """Weights that must be equal are different."""

    exit_code = 9


class Interrupted(DmnistError):
    """A signal stopped the run, which can be resumed. The code is BSD's EX_TEMPFAIL, "try again"."""

    exit_code = 75


_KINDS: dict[str, type[DmnistError]] = {
    kind.__name__: kind
    for kind in (
        DmnistError,
        UsageError,
        DataError,
        CheckpointError,
        LaunchError,
        OutputError,
        TrainingError,
        WorkerLost,
        Hang,
        VerificationError,
        Interrupted,
    )
}

_OUTPUT_GONE = (errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EBADF)
"""Errors from writing to standard output: its disk is full, its terminal or reader is gone, or closed."""
_LIMITS = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "this host has too many open files",
    errno.EAGAIN: "raise the limit of processes and threads (`ulimit -u`, or a container's)",
    errno.ENOMEM: "free memory, or raise its limit (`ulimit -v`, or a container's)",
}
"""Errors of the operating system when a limit is reached, and what to do."""
_PATHS = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ESTALE,
)
"""Errors of the operating system for a path that cannot be used."""


def reason(error: OSError) -> str:
    """Return the operating system's message for use in a sentence: "no space left on device"."""
    return (error.strerror or str(error)).lower()


def explain(error: BaseException) -> BaseException:
    """Return an error that a user can fix for one that has its cause outside of this program.

    Other errors are returned as they are.
    """
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        what_to_do = "use a smaller --batch-size, or a device that no other program uses"
        return LaunchError(f"not enough memory on the device: {what_to_do} ({error})")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        error = OSError(errno.ENOMEM, "not enough memory")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        error = OSError(errno.EAGAIN, str(error))
    if not isinstance(error, OSError):
        return error
    told: BaseException = error
    if (
        isinstance(error, BlockingIOError)
        and error.filename is None
        and hasattr(error, "characters_written")
    ):
        told = OutputError("the output cannot be written: it does not wait for its reader")
    elif error.errno in _LIMITS:
        told = LaunchError(f"{reason(error)}: {_LIMITS[error.errno]}")
    elif error.filename is not None and error.errno in _PATHS:
        told = UsageError(f"{shortened(str(error.filename))}: {reason(error)}")
    elif error.filename is None and error.errno in _OUTPUT_GONE:
        told = OutputError(f"the output cannot be written: {reason(error)}")
    return told


def described(error: BaseException | None) -> tuple[str, str]:
    """Return the name of a class and a message, from which another process can `recreate` the error.

    The class is `DmnistError` for exceptions from other libraries.
    """
    error = explain(error) if error else error
    if isinstance(error, DmnistError):
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
        return name, printable(str(error))
    return DmnistError.__name__, printable(f"{type(error).__name__}: {error}")


def recreate(name: str, message: str) -> DmnistError:
    """Return the error that another process described. Only the classes of this file can be named."""
    return _KINDS[name](message)


def print_error(error: BaseException, placement: Placement = ALONE, *, debug: bool = False) -> int:
    """Print an error as one line on standard error, if this rank should; return the exit code.

    If all ranks raise the error, only rank 0 prints it. If only some raise it, each of them prints it with
    its rank in front. `debug` adds the traceback. If standard error cannot be written, a command with
    `--json` prints the error as its JSON object instead.
    """

    def tell(text: str, code: int) -> int:
        if not print_note(text, placement) and "--json" in sys.argv:
            try_to_write(sys.stdout, json.dumps({"error": text, "exit_code": code}) + "\n")
        return code

    if debug:
        try_to_write(sys.stderr, "".join(traceback.format_exception(error)))
    if isinstance(error, KeyboardInterrupt):
        text = "stopped at once; nothing saved since the last checkpoint"
        return tell(text, 130) if placement.rank == 0 else 130
    error = explain(error)
    if not isinstance(error, DmnistError):
        message = f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)"
        return tell(message, 1)
    # Our own launcher knows how a process ended, so its report is better than that of the other ranks.
    reported_by_launcher = type(error) is WorkerLost and placement.launcher == "spawned"
    if (placement.rank == 0 or error.on_one_rank) and not reported_by_launcher:
        tell(str(error), error.exit_code)
    return error.exit_code


def tidy_terminal(stream: TextIO, *, cursor: bool = False) -> None:
    """Erase what is left of a live progress bar; with `cursor`, show the hidden cursor again."""
    if stream.isatty():
        try_to_write(stream, "\r\x1b[K" + "\x1b[?25h" * cursor)


def print_note(text: str, placement: Placement) -> bool:
    """Print one line on standard error, from any rank. Return whether it could be written."""
    tidy_terminal(sys.stderr)
    # Our own launcher adds the rank to each line that a rank prints. Under other launchers, add it here.
    rank = f"rank {placement.rank}: " if placement.rank and placement.launcher != "spawned" else ""
    return write_line(f"{rank}{' '.join(text.split())}")


def write_line(text: str) -> bool:
    """Print a line for people on standard error, wrapped between words if it is a terminal.

    Return whether it could be written.
    """
    line = f"dmnist: {printable(text)}"
    if sys.stderr.isatty():  # a terminal would break the line within a word
        width = max(shutil.get_terminal_size().columns, 40)
        line = textwrap.fill(
            line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return try_to_write(sys.stderr, f"{line}\n")
