"""Read a run's folder at any time: during the run, after it has ended, or after it was killed.

`metrics.jsonl` is append-only. Steps that were repeated after a crash appear twice, and the later entry is
used.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, reason
from .lock import is_live

Event = dict[str, Any]
"""A line of `metrics.jsonl`: `event` (its kind), `time` (seconds since 1970), and that kind's fields."""


@dataclass(frozen=True)
class Record:
    """The content of a run's files."""

    path: Path
    config: dict[str, Any]
    """`config.json`: `recipe`, `run`, `dataset`, `versions`."""
    events: list[Event]
    """All events, oldest first."""
    steps: list[Event]
    """The `steps` events in order of steps. For repeated steps only the latest."""
    evaluations: list[Event]
    """The `evaluation` events in order of steps. For repeated steps only the latest."""
    result: dict[str, Any] | None
    """`result.json`; None for a run that has not finished."""
    mistakes: dict[str, Any] | None
    """`mistakes.json`: the `step` of the latest evaluation and its `mistakes`."""

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number if `config.json` has no name for it."""
        names = self.config.get("dataset", {}).get("class_names", [])
        return names[label] if label < len(names) else str(label)

    @property
    def state(self) -> str:
        """The run's state: `finished`, `running`, or `stopped` (the run can be resumed)."""
        if self.events and self.events[-1]["event"] == "end":
            return "finished"
        if is_live(self.path):
            return "running"
        # A full disk can end metrics.jsonl before the run ends.
        complete = self.result and self.starts and self.result.get("steps") == self.starts[-1].get("steps")
        return "finished" if complete else "stopped"

    @property
    def starts(self) -> list[Event]:
        """The `start` events: one for each start of the run's processes."""
        return [event for event in self.events if event["event"] == "start"]


def read(folder: Path) -> Record:
    """Read the run in `folder`. Raises `UsageError` if it has no run, or if a file cannot be read."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # the last may be incomplete
    except OSError as error:
        problem = f"not a run: it has no metrics.jsonl ({reason(error)})"
        if members := sorted(folder.glob("seed-*")):
            problem = f"an ensemble: name one of its members, such as {members[0]}"
        raise UsageError(f"{folder} is {problem}") from None
    events = [event for line in lines if (event := event_of(line)) is not None]
    return Record(
        path=folder,
        config=_read_json(folder / "config.json") or {},
        events=events,
        steps=_without_repeated_steps(events, "steps"),
        evaluations=_without_repeated_steps(events, "evaluation"),
        result=_read_json(folder / "result.json"),
        mistakes=_read_json(folder / "mistakes.json"),
    )


def event_of(line: bytes) -> Event | None:
    """Parse a line of `metrics.jsonl`. Return None if a full disk or a crash has damaged the line."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"event", "time"} <= set(event) else None


def _without_repeated_steps(events: list[Event], kind: str) -> list[Event]:
    """Return the events of one kind, without events for steps that were repeated after a later start."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":
            while kept and kept[-1]["step"] > event["step"]:
                kept.pop()
        elif event["event"] == kind:
            kept.append(event)
    return kept


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else None
