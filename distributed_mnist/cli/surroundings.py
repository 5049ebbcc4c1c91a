"""Prepare what a program gets from its surroundings: standard streams, and a current folder."""

import sys
from pathlib import Path

from ..common import environment
from ..common.streams import prepare_streams, redirect_to_null
from ..errors import UsageError, print_error, reason


def prepare() -> None:
    """Open standard streams that were closed, and let text be written that they cannot encode.

    Also set how OpenMP's threads wait, which it reads when torch is imported.

    Raises `UsageError` if the current folder was deleted: libraries then fail in many ways.
    """
    prepare_streams()
    environment.wait_briefly()
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be used ({reason(error)}): cd to one that exists"
        ) from None


def finish(code: int) -> int:
    """Write what is left in the streams. Return the exit code, which is no longer 0 if output is lost."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            redirect_to_null(stream)
            wanted = stream is sys.stdout and not isinstance(error, BrokenPipeError)  # as by `| head`
            code = print_error(error) if wanted and code == 0 else code
    return code
