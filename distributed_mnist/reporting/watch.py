"""`dmnist watch`: what a run shows where it was started, seen from elsewhere, by its files alone."""

import os
import time
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UsageError, WorkerLost
from ..runs import layout
from ..runs.lock import is_live
from ..runs.record import Event, event_of, read
from .console import make_console, print_json
from .stragglers import StragglerTracker
from .terminal import Terminal

_LOOK_SECONDS = 0.25
_GRACE_SECONDS = 10.0
"""That a run may be silent with nobody holding its lock: it is being started again."""
_PATIENCE = 60.0
"""That one may take to begin."""


class Tail:
    """The events that are appended to a run's `metrics.jsonl`, each told once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._read = 0  # bytes, up to the last whole line
        self._file = 0  # its number in the file system

    def new(self) -> list[Event]:
        """What came since the last call. Raises `UsageError` if there is no such file."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file or found.st_size < self._read:  # another run in its place
                    self._file, self._read = found.st_ino, 0
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:
            read(self._path.parent)  # says what is wrong
            raise UsageError(f"{self._path} cannot be read") from None
        self._read += len(whole) + bool(whole)
        return [event for line in whole.splitlines() if (event := event_of(line)) is not None]


def run(*, run: Path, as_json: bool) -> int:
    """Follow the run in folder `run` until it ends; the exit code.

    Raises `UsageError` where there is no run, `WorkerLost` for one that nobody trains,
    `Interrupted` for one that was asked to stop."""
    if as_json:
        print_json(state(run))
        return 0
    terminal = Terminal(make_console(), ranks=True)
    try:
        _wait_for(run, terminal)
        return _follow(run, terminal)
    except KeyboardInterrupt:
        return 0  # the usual way to end it; the run goes on
    finally:
        terminal.close()


def _wait_for(folder: Path, terminal: Terminal) -> None:
    """Until a run has begun in the folder, or for so long that none will: `Tail` says so."""
    told = False
    deadline = time.monotonic() + _PATIENCE
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        if folder.is_file() or layout.members_in(folder):
            read(folder)  # says that it is no run's, or that one of an ensemble's must be named
        if not told:
            terminal.log("notice", text=f"no run in {folder} yet: waiting for it to begin")
        told = True
        time.sleep(_LOOK_SECONDS)


def _follow(folder: Path, terminal: Terminal) -> int:
    tail, silent, step = Tail(folder), time.monotonic(), 0
    last: Event = {"event": ""}
    resume_flags = f"go on with dmnist train {layout.resume_flags(folder)}"
    while True:
        events = tail.new()
        for event in events:
            fields = {key: value for key, value in event.items() if key not in ("event", "time")}
            terminal.log(event["event"], **fields)
            step = event.get("step", step)
        last = events[-1] if events else last
        if last["event"] == "end":
            return 0
        if last["event"] == "stop" and not is_live(folder):
            raise Interrupted(f"it was asked to stop, and did after step {last['step']}: {resume_flags}")
        if events:
            silent = time.monotonic()
        elif time.monotonic() - silent > _GRACE_SECONDS and not is_live(folder):
            if read(folder).state == "finished":  # a full disk ended the record before the run
                return 0
            raise WorkerLost(
                f"nobody trains {folder} any more, {_last_heard(folder)} at step {step}: {resume_flags}"
            )
        time.sleep(_LOOK_SECONDS)


def _last_heard(folder: Path) -> str:
    events = read(folder).events
    if not events:
        return "never heard of"
    return f"last heard of {time.time() - events[-1]['time']:,.0f} s ago"


def state(folder: Path) -> dict[str, Any]:
    """How a run stands now, in plain values."""
    record = read(folder)
    waiting = StragglerTracker()
    for event in record.events:
        if event["event"] == "start":
            waiting.begin(event.get("ranks", ()))
        elif event["event"] == "steps" and "ranks" in event:  # older runs do not tell
            waiting.add(event["ranks"])
    last = record.steps[-1] if record.steps else {}
    scored = record.evaluations[-1] if record.evaluations else {}
    return {
        "run": str(folder),
        "state": record.state,
        "step": last.get("step", 0),
        "steps": record.starts[-1]["steps"] if record.starts else None,
        "epoch": last.get("epoch", 0.0),
        "loss": last.get("loss"),
        "test_accuracy": scored.get("test_accuracy"),
        "images_per_second": last.get("images_per_second"),
        "starts": len(record.starts),
        "seconds_since_news": time.time() - record.events[-1]["time"] if record.events else None,
        "ranks": {"busy": waiting.busy, "exchange": waiting.exchange},
        "slowest_rank": waiting.slowest if len(waiting.exchange) > 1 else None,
        "waiting_share": waiting.share if len(waiting.exchange) > 1 else 0.0,
    }
