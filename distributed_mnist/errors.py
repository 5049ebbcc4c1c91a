"""What can go wrong for reasons a user can mend, each with the exit code the program ends with.

Every one of these is shown as a single line; anything else that escapes is a defect and told as a
defect. `docs/reference/exit-codes.md` lists the codes for scripts.
"""

import errno
import shutil
import sys
import textwrap
import traceback
from typing import TextIO

from .common.placement import ALONE, Placement


class DmnistError(Exception):
    """Base of all expected errors. `str(error)` is the one line that the user sees."""

    exit_code = 1
    on_one_rank = False
    """Raised on some ranks only; otherwise every rank raises the same, and rank 0 tells it for all."""


class UsageError(DmnistError):
    """A flag, a recipe or a model that cannot be used as given."""

    exit_code = 2


class DataError(DmnistError):
    """A data set that is missing, damaged, or not what its name says."""

    exit_code = 3


class CheckpointError(DmnistError):
    """A checkpoint that cannot be read, or that belongs to another run."""

    exit_code = 4


class LaunchError(DmnistError):
    """Processes that cannot be started, found or connected."""

    exit_code = 5
    on_one_rank = True


class OutputError(DmnistError):
    """A run's folder that cannot be written, or that is in use."""

    exit_code = 6


class TrainingError(DmnistError):
    """A run that went wrong by itself: a loss that is not finite."""

    exit_code = 7


class WorkerLost(DmnistError):
    """A process of the group died or can no longer be reached."""

    exit_code = 8
    on_one_rank = True


class Hang(WorkerLost):
    """A process of the group, or the group, does not go on."""


class VerificationError(DmnistError):
    """Weights that must be equal are not."""

    exit_code = 9


class Interrupted(DmnistError):
    """Asked to stop by a signal; the run can be resumed. The code is BSD's EX_TEMPFAIL, "try again"."""

    exit_code = 75


_OUTPUT_GONE = (errno.ENOSPC, errno.EIO, errno.EPIPE)
"""Of a file without a name: standard output is on a full disk, its terminal or its reader is gone."""


def reason(error: OSError) -> str:
    """What the system said, in the middle of a sentence: "no space left on device"."""
    return (error.strerror or str(error)).lower()


def described(error: Exception | None) -> tuple[type[DmnistError], str]:
    """An error as another rank can raise it: its text, and its class where that takes just a text."""
    if isinstance(error, DmnistError):
        return type(error), str(error)
    return DmnistError, f"{type(error).__name__}: {error}"


def tell(error: BaseException, placement: Placement = ALONE, *, debug: bool = False) -> int:
    """Print an error as one line on standard error, if it is this rank's to tell; its exit code.

    Rank 0 tells what all ranks know; what happened to one rank, that one tells, with its number in front.
    """
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        if placement.rank == 0:
            _print(placement, "stopped at once; nothing saved since the last checkpoint")
        return 130
    if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_GONE:
        error = OutputError(f"the output cannot be written: {reason(error)}")
    if not isinstance(error, DmnistError):
        what = f"a defect, please report it: {type(error).__name__}: {error} (--debug shows where)"
        _print(placement, what)
        return 1
    # Our launcher knows better than those who lost it how a process ended.
    told_by_launcher = type(error) is WorkerLost and placement.launcher == "spawned"
    if (placement.rank == 0 or error.on_one_rank) and not told_by_launcher:
        _print(placement, str(error))
    return error.exit_code


def tidy_terminal(stream: TextIO, *, cursor: bool = False) -> None:
    """Wipe away what is left of a live bar, and show the cursor that it hid."""
    if stream.isatty():
        stream.write("\r\x1b[K" + "\x1b[?25h" * cursor)
        stream.flush()


def _print(placement: Placement, text: str) -> None:
    tidy_terminal(sys.stderr)
    # Our own launcher puts the rank in front of whatever a rank prints; under others we do.
    rank = f"rank {placement.rank}: " if placement.rank and placement.launcher != "spawned" else ""
    write_line(f"{rank}{' '.join(text.split())}")


def write_line(text: str) -> None:
    """For people, on standard error: one line, which a terminal gets wrapped at words."""
    line = f"dmnist: {text}"
    if sys.stderr.isatty():  # which would break it within a word
        wide = max(shutil.get_terminal_size().columns, 40)
        line = textwrap.fill(
            line, wide, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
