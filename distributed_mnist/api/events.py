"""Pass the events of a run with several processes to a function in the process that called `train`."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

OnEvent = Callable[[dict[str, Any]], object]
"""Is called with each event: the content of a line of `metrics.jsonl`, see docs/reference/run-folder.md."""


class EventFollower:
    """Reads `metrics.jsonl` while the workers write it, and calls a function with each new event, once.

    The file is append-only, also after a restart of the workers. Only an unfinished last line is ever
    removed from it, and such a line is not read.
    """

    def __init__(self, path: Path, on_event: OnEvent) -> None:
        self._path, self._on_event, self._offset = path, on_event, 0
        self.error: BaseException | None = None
        """What the function raised. It is not called after that."""
        for line in self._new_lines():  # of an earlier start of the run
            self._offset += len(line)

    def __call__(self) -> bool:
        """Pass on the new events. Returns whether the run may go on, which is not so after an error."""
        for line in self._new_lines() if self.error is None else []:
            self._offset += len(line)
            with contextlib.suppress(ValueError):  # a damaged line
                event = json.loads(line)
                try:
                    self._on_event(event)
                except BaseException as error:  # it must not keep the launcher from ending the workers
                    self.error = error
                    return False
        return self.error is None

    def _new_lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except OSError:  # there is none yet
            return []
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
