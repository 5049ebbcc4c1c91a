"""What a run's folder tells of it, at any time: while it runs, after it ended, after it was killed.

`metrics.jsonl` is appended to and never rewritten: what was trained again after a crash stands there twice,
and the later counts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, reason
from .lock import is_live

Event = dict[str, Any]
"""A line of `metrics.jsonl`: `event`, `time` (seconds since 1970), and fields of its own."""


@dataclass(frozen=True)
class Record:
    """A run as its files tell it."""

    path: Path
    config: dict[str, Any]
    """`config.json`: `recipe`, `run`, `dataset`, `versions`."""
    events: list[Event]
    """All of them, in the order of time."""
    steps: list[Event]
    """The `steps` events of what counts, by step."""
    evaluations: list[Event]
    """The `evaluation` events of what counts, by step."""
    result: dict[str, Any] | None
    """`result.json`; None for a run that has not ended."""
    mistakes: dict[str, Any] | None
    """`mistakes.json`: the `step` of the latest evaluation and its `mistakes`."""

    def class_name(self, label: int) -> str:
        """What a class is called; its number where `config.json` does not tell."""
        names = self.config.get("dataset", {}).get("class_names", [])
        return names[label] if label < len(names) else str(label)

    @property
    def state(self) -> str:
        """finished, running, or stopped: it can be gone on with."""
        if self.events and self.events[-1]["event"] == "end":
            return "finished"
        if is_live(self.path):
            return "running"
        # A full disk ends the record before the run.
        whole = self.result and self.starts and self.result.get("steps") == self.starts[-1].get("steps")
        return "finished" if whole else "stopped"

    @property
    def starts(self) -> list[Event]:
        """A `start` event for each time that the processes of the run were started."""
        return [event for event in self.events if event["event"] == "start"]


def read(folder: Path) -> Record:
    """The run in `folder`. Raises `UsageError` where there is none, or its files are no run's."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # the last may not be whole yet
    except OSError as error:
        told = f"no run: it has no metrics.jsonl ({reason(error)})"
        if seeds := sorted(folder.glob("seed-*")):
            told = f"an ensemble: name one of its networks, such as {seeds[0]}"
        raise UsageError(f"{folder} is {told}") from None
    events = [event for line in lines if (event := event_of(line)) is not None]
    return Record(
        path=folder,
        config=_json(folder / "config.json") or {},
        events=events,
        steps=_counting(events, "steps"),
        evaluations=_counting(events, "evaluation"),
        result=_json(folder / "result.json"),
        mistakes=_json(folder / "mistakes.json"),
    )


def event_of(line: bytes) -> Event | None:
    """A line as an event; None for one that a full disk or a crash has spoiled."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"event", "time"} <= set(event) else None


def _counting(events: list[Event], kind: str) -> list[Event]:
    """Events of a kind without those of steps that a later start has taken again."""
    found: list[Event] = []
    for event in events:
        if event["event"] == "start":
            while found and found[-1]["step"] > event["step"]:
                found.pop()
        elif event["event"] == kind:
            found.append(event)
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else None
