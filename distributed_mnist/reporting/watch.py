"""Run `dmnist watch`: follow a run from another terminal or host, using only the run's files."""

import os
import time
from pathlib import Path
from typing import Any

from ..common.regular_file import open_regular
from ..errors import Interrupted, UsageError, WorkerLost
from ..runs import layout
from ..runs.lock import is_live
from ..runs.record import Event, read
from ..runs.run_files import event_of
from .console import make_console, print_json
from .progress_bar import Terminal
from .stragglers import StragglerTracker

_POLL_SECONDS = 0.25
_RESTART_SECONDS = 10.0
"""A run whose lock is free may be restarting; after this long without events it has ended."""
_START_TIMEOUT_SECONDS = 60.0
"""How long to wait for a run to begin."""


class Tail:
    """Reads the events appended to a run's `metrics.jsonl`, each event once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._offset = 0  # bytes, up to the end of the last complete line
        self._inode = 0
        self.damaged_lines = 0

    def new_events(self) -> list[Event]:
        """Return the events since the last call. Raises `UsageError` if there is no such file."""
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:  # a new run in the folder
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")[0]
        except OSError:
            read(self._path.parent)  # raises with the cause
            raise UsageError(f"{self._path} cannot be read") from None
        self._offset += len(complete) + bool(complete)
        lines = complete.split(b"\n") if complete else []
        events = [event for line in lines if (event := event_of(line)) is not None]
        self.damaged_lines += len(lines) - len(events)
        return events


def run(*, run: Path, as_json: bool) -> int:
    """Follow the run in the folder `run` until it ends, and return the exit code.

    Raises `UsageError` if there is no run, `WorkerLost` if no process trains it any more, and
    `Interrupted` if it was asked to stop.
    """
    if as_json:
        print_json(state(run))
        return 0
    terminal = Terminal(make_console(), ranks=True)
    try:
        _wait_for(run, terminal)
        return _follow(run, terminal)
    except KeyboardInterrupt:
        return 0  # Ctrl-C is the usual way to stop watching; the run continues
    finally:
        terminal.close()


def _wait_for(folder: Path, terminal: Terminal) -> None:
    """Wait until a run has begun in the folder. Return after a timeout; `Tail` then raises an error."""
    noticed = False
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        if folder.is_file() or layout.members_in(folder):
            read(folder)  # raises: it is not a run's folder, or one run of an ensemble must be named
        if not noticed:
            terminal.log("notice", text=f"no run in {folder} yet: waiting for it to begin")
        noticed = True
        time.sleep(_POLL_SECONDS)


def _follow(folder: Path, terminal: Terminal) -> int:
    tail, last_news, step = Tail(folder), time.monotonic(), 0
    last: Event = {"event": ""}
    noticed = False
    hint = f"resume with dmnist train {layout.resume_flags(folder)}"
    while True:
        events = tail.new_events()
        if tail.damaged_lines and not noticed:
            noticed = True
            terminal.log("notice", text=f"{folder}/metrics.jsonl has damaged lines, which are skipped")
        for event in events:
            fields = {key: value for key, value in event.items() if key not in ("event", "time")}
            terminal.log(event["event"], **fields)
            step = event.get("step", step)
        last = events[-1] if events else last
        if last["event"] == "end":
            return 0
        if last["event"] == "stop" and not is_live(folder):
            raise Interrupted(f"the run was asked to stop, and stopped after step {last['step']}: {hint}")
        if events:
            last_news = time.monotonic()
        elif time.monotonic() - last_news > _RESTART_SECONDS and not is_live(folder):
            if read(folder).state == "finished":  # a full disk ended the record before the run
                return 0
            raise WorkerLost(
                f"no process trains {folder} any more, {_last_event(folder)} at step {step}: {hint}"
            )
        time.sleep(_POLL_SECONDS)


def _last_event(folder: Path) -> str:
    events = read(folder).events
    if not events:
        return "it has recorded no event"
    return f"its last event was {time.time() - events[-1]['time']:,.0f} s ago"


def state(folder: Path) -> dict[str, Any]:
    """Return the current state of a run as plain values, for `--json`."""
    record = read(folder)
    stragglers = StragglerTracker()
    for event in record.events:
        if event["event"] == "start":
            stragglers.start_group(event.get("ranks", ()))
        elif event["event"] == "steps" and "ranks" in event:  # older runs have no such field
            stragglers.add(event["ranks"])
    last = record.steps[-1] if record.steps else {}
    evaluation = record.evaluations[-1] if record.evaluations else {}
    test = record.test or evaluation
    return {
        "run": str(folder),
        "state": record.state,
        "step": last.get("step", 0),
        "steps": record.starts[-1]["steps"] if record.starts else None,
        "epoch": last.get("epoch", 0.0),
        "loss": last.get("loss"),
        "test_accuracy": test.get("test_accuracy"),
        "validation_accuracy": evaluation.get("validation_accuracy"),
        "images_per_second": last.get("images_per_second"),
        "starts": len(record.starts),
        "seconds_since_news": time.time() - record.events[-1]["time"] if record.events else None,
        "ranks": {
            "busy": stragglers.busy,
            "exchange": stragglers.exchange,
            **({"share": stragglers.share} if stragglers.share else {}),
        },
        "slowest_rank": stragglers.slowest_rank if len(stragglers.exchange) > 1 else None,
        "waiting_share": stragglers.waiting_share if len(stragglers.exchange) > 1 else 0.0,
    }
