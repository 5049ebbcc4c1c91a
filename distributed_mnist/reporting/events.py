"""What a run tells: events go to a sink, and a sink is a file, a terminal, several, or nothing.

Events are plain fields under a name: `start`, `notice`, `steps`, `evaluation`, `mistakes`, `checkpoint`,
`stop`, `end`. Only rank 0 has a sink that does anything; the code that logs never asks.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from ..errors import OutputError, reason, write_line
from ..runs.layout import write_json


class Sink(Protocol):
    """Takes events."""

    def log(self, event: str, **fields: Any) -> None:
        """One event with its fields; numbers, strings and lists of them."""
        ...

    def close(self) -> None:
        """No event comes after this."""
        ...


class NullSink:
    """Of a rank that says nothing."""

    def log(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Notices:
    """Of a rank that keeps a copy of the checkpoints on another host: it tells what goes wrong there."""

    def __init__(self, who: str) -> None:
        self._who = who

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        if event == "notice":
            write_line(f"{self._who}: {fields['text']}")

    def close(self) -> None:
        """Nothing."""


class MultiSink:
    """Every event to each of several sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.log(event, **fields)

    def close(self) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """`metrics.jsonl`: one JSON object an event, with the event's name and the time it was written.

    Appended to, never rewritten: after a crash and a resume the lines of repeated steps are there twice,
    and the later one counts.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        try:
            _drop_unfinished_line(path)
            self._file: TextIO | None = path.open("a")
        except OSError as error:
            raise OutputError(f"{path}: {reason(error)}") from None
        self._path, self._complain = path, complain

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`. A full disk ends the record, not the run."""
        if self._file is None or event == "mistakes":  # those are `MistakesFile`'s
            return
        try:
            self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            broken, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing tries to write what is left, and fails again
                broken.close()
            self._complain(f"{self._path} ends here: {reason(error)}")

    def close(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_unfinished_line(path: Path) -> None:
    """Of a writer that was killed in the middle of it."""
    if path.exists():
        with path.open("rb+") as file:
            whole = file.read().rpartition(b"\n")
            file.truncate(len(whole[0]) + len(whole[1]))


class MistakesFile:
    """`mistakes.json`: what the latest evaluation took for something else, and at which step that was."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._path, self._complain = path, complain
        self._told = False

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`. A full disk costs the file, not the run."""
        if event != "mistakes":
            return
        try:
            write_json(self._path, fields)
        except OutputError as error:
            if not self._told:
                self._complain(str(error))
            self._told = True

    def close(self) -> None:
        """See `Sink`."""
