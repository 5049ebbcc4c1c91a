"""Where a command's own output goes: text for people, or one JSON object for scripts."""

import json
import sys
from typing import Any

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """Where people read: standard output, or standard error where that belongs to a JSON object."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 1000  # whoever reads a file or a pipe wants whole lines
    return console


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
