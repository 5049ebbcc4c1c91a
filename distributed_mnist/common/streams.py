"""Write to standard output and standard error, whose disk, terminal or reader may be gone."""

import contextlib
import io
import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Open standard streams that were closed (`>&-`), and let text be written that they cannot encode.

    Otherwise a file or socket would get the number of a closed stream, to which libraries write. Writing to
    them still fails, so that it is reported.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False, encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        # A notebook may have put another object in its place.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(OSError):  # a pipe that has replaced a file has no position
                stream.reconfigure(errors="backslashreplace")


def try_to_write(stream: TextIO, text: str) -> bool:
    """Write and flush text. Return False if the stream cannot be written, which must not end a run."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def redirect_to_null(stream: TextIO) -> None:
    """Send a stream to /dev/null, so that the flush at the end of the process cannot fail again."""
    with contextlib.suppress(OSError, ValueError):  # some streams have no file descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
