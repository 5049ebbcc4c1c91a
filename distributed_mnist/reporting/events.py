"""Send the events of a run to sinks: a file, a terminal, several of them, or none.

An event is a name and plain fields. The names are `start`, `notice`, `steps`, `evaluation`, `mistakes`,
`checkpoint`, `stop` and `end`. The training loop logs on every rank; only rank 0 has a sink that records.
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
        """Take one event. Its fields are numbers, strings, and lists or dictionaries of them."""
        ...

    def close(self) -> None:
        """End the record; no event comes after this."""
        ...


class NullSink:
    """Drops all events. For ranks that record nothing."""

    def log(self, event: str, **fields: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class NoticeSink:
    """Prints notices and drops other events.

    Used by a rank that keeps a copy of the checkpoints on another host, to report problems on that host.
    """

    def __init__(self, rank_name: str) -> None:
        self._rank_name = rank_name

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        if event == "notice":
            write_line(f"{self._rank_name}: {fields['text']}")

    def close(self) -> None:
        """Do nothing."""


class MultiSink:
    """Sends every event to several sinks."""

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
    """Writes `metrics.jsonl`: one JSON object per event, with the event's name and the time of writing.

    The file is append-only. After a crash and a resume it contains the lines of repeated steps twice;
    readers use the later ones.
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
        if self._file is None or event == "mistakes":  # `MistakesFile` writes those
            return
        try:
            self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            broken, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing tries to write the rest, and fails again
                broken.close()
            self._complain(f"{self._path} ends here: {reason(error)}")

    def close(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_unfinished_line(path: Path) -> None:
    """Remove a last line that a killed process left unfinished."""
    if path.exists():
        with path.open("rb+") as file:
            complete = file.read().rpartition(b"\n")
            file.truncate(len(complete[0]) + len(complete[1]))


class MistakesFile:
    """Writes `mistakes.json`: the misclassified images of the latest evaluation, and its step."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._path, self._complain = path, complain
        self._complained = False

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`. On a full disk the file is lost, but the run continues."""
        if event != "mistakes":
            return
        try:
            write_json(self._path, fields)
        except OutputError as error:
            if not self._complained:
                self._complain(str(error))
            self._complained = True

    def close(self) -> None:
        """Do nothing."""
