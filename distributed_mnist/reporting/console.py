"""Where a command's own output goes: text for people, or one JSON object for scripts."""

import contextlib
import json
import os
import sys
from typing import Any, TextIO

from rich.console import Console

from ..errors import OutputError, reason


class _Plain(Console):
    """Shows text as it is: a folder may be called `[/red]`."""

    def __init__(self, *, stderr: bool) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(
            stderr=stderr,
            markup=False,
            highlight=False,
            # rich would also draw live bars into a file where FORCE_COLOR is set, as in notebooks and CI
            force_terminal=None if stream.isatty() else False,
        )

    def on_broken_pipe(self) -> None:
        """Nobody reads any more (`| head`): that is no reason to stop, as rich would."""
        fall_silent(self)


def make_console(*, stderr: bool = False) -> Console:
    """Where people read: standard output, or standard error where that belongs to a JSON object."""
    console = _Plain(stderr=stderr)
    if not console.file.isatty():
        console.width = 1000  # whoever reads a file or a pipe wants whole lines
    return console


def fall_silent(console: Console) -> None:
    """Print nothing more, of what is waiting to be printed neither."""
    console.quiet = True
    _let_go(console.file)  # type: ignore[arg-type]


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of standard output. Raises `OutputError` if it cannot be written."""
    try:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
    except OSError as error:
        _let_go(sys.stdout)
        raise OutputError(f"standard output: {reason(error)}") from None


def _let_go(stream: TextIO) -> None:
    """What is left in its buffer must not fail once more when the process ends."""
    with contextlib.suppress(OSError, ValueError):  # some streams are no files
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
