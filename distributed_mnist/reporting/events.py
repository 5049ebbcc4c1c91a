"""Send the events of a run to sinks: a file, a terminal, several of them, or none.

An event is a name and plain fields. The names are `start`, `notice`, `steps`, `evaluation`, `mistakes`,
`checkpoint`, `test`, `stop` and `end`. The training loop logs on every rank; only rank 0 has a sink that
records.
"""

import contextlib
import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from ..distributed.heartbeat import RankStatus
from ..errors import OutputError, reason, write_line
from ..runs.layout import write_json

_CALLBACK_PATIENCE_SECONDS = 3600.0
_MAX_WAITING_BYTES = 16 << 20
"""The most that `metrics.jsonl` holds in memory while the disk is full: many minutes of a run."""


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


class Callback:
    """Calls a user's function with every event that `metrics.jsonl` gets, as read from there.

    What the function raises ends the run. `status` is that of the world: a slow function is not a hang.
    """

    def __init__(self, function: Callable[[dict[str, Any]], object], status: RankStatus) -> None:
        self._function, self._status = function, status

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        if event != "mistakes":
            with self._status.during("on_event", _CALLBACK_PATIENCE_SECONDS):
                self._function(json.loads(json.dumps({"event": event, "time": time.time(), **fields})))

    def close(self) -> None:
        """Do nothing."""


class JsonLines:
    """Writes `metrics.jsonl`: one JSON object per event, with the event's name and the time of writing.

    The file is append-only. After a crash and a resume it contains the lines of repeated steps twice;
    readers use the later ones. On a full disk the lines wait in memory, up to `_MAX_WAITING_BYTES`, and are
    written once there is room.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        try:
            _drop_unfinished_line(path)
            # Without a buffer, so that it is known which bytes were written before an error.
            self._file: FileIO | None = path.open("ab", buffering=0)
        except OSError as error:
            raise OutputError(f"{path}: {reason(error)}") from None
        self._path, self._complain = path, complain
        self._waiting = deque[bytes]()
        self._waiting_bytes, self._lost = 0, 0
        self._complained = False

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        if self._file is None or event == "mistakes":  # `MistakesFile` writes those
            return
        line = json.dumps({"event": event, "time": time.time(), **fields}).encode() + b"\n"
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        try:
            self._write(self._file)
        except OSError as error:
            if not self._complained:
                text = f"{self._path} cannot be written now ({reason(error)}); later events are added to it"
                self._complain(f"{text} once that is possible")
            self._complained = True
        while self._waiting_bytes > _MAX_WAITING_BYTES and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting[1])
            del self._waiting[1]  # part of the first one may be in the file already
            self._lost += 1

    def _write(self, file: FileIO) -> None:
        while self._waiting:
            line = self._waiting.popleft()
            written = 0
            try:
                written = file.write(line) or 0
            finally:
                self._waiting_bytes -= written
                if written < len(line):
                    self._waiting.appendleft(line[written:])
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def close(self) -> None:
        """See `Sink`."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            self._write(file)
        with contextlib.suppress(OSError):
            file.close()
        if lost := self._lost + len(self._waiting):
            self._complain(f"{self._path} lacks {lost} events, which could not be written")


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
