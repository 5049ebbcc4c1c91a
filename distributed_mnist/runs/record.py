"""Read a run's folder at any time: during the run, after it has ended, or after it was killed.

`metrics.jsonl` is append-only. Steps that were repeated after a crash appear twice, and the later entry is
used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.regular_file import read_regular
from ..errors import CheckpointError, UsageError, reason
from .lock import is_live
from .run_files import event_of, read_config, read_mistakes, read_result

_MAX_BYTES = 4 << 30  # weeks of a run
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
    test: Event | None
    """The `test` event of a finished run with a validation split: the scores of its result."""
    result: dict[str, Any] | None
    """`result.json`; None for a run that has not finished."""
    mistakes: dict[str, Any] | None
    """`mistakes.json`: the `step` of the latest evaluation, its kind of `images`, and its `mistakes`."""
    problems: Sequence[str] = ()
    """What could not be read, in one line each: damaged files, which count as absent, and damaged lines."""

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
        # A run with a validation split may end early, and cannot be continued with more steps.
        complete = complete or (self.result and "best_step" in self.result)
        return "finished" if complete else "stopped"

    @property
    def scored(self) -> Event | None:
        """The latest `evaluation` or `test` event; None before the first."""
        return self.test or (self.evaluations[-1] if self.evaluations else None)

    @property
    def starts(self) -> list[Event]:
        """The `start` events: one for each start of the run's processes."""
        return [event for event in self.events if event["event"] == "start"]


def read(folder: Path) -> Record:
    """Read the run in `folder`, as far as its files are undamaged.

    Raises `UsageError` if there is no run, or if `metrics.jsonl` cannot be read.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = read_regular(path, _MAX_BYTES).split(b"\n")[:-1]  # the last may be incomplete
    except OSError as error:
        problem = f"not a run: it has no metrics.jsonl ({reason(error)})"
        if members := sorted(folder.glob("seed-*")):
            problem = f"an ensemble: name one of its members, such as {members[0]}"
        raise UsageError(f"{folder} is {problem}") from None
    problems: list[str] = []
    events = [event for line in lines if (event := event_of(line)) is not None]
    if damaged := len(lines) - len(events):
        problems.append(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} skipped")

    def readable(read_file: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any] | None:
        try:
            return read_file(folder)
        except CheckpointError as error:
            problems.append(str(error))
            return None

    return Record(
        path=folder,
        config=readable(read_config) or {},
        events=events,
        steps=_without_repeated_steps(events, "steps"),
        evaluations=_without_repeated_steps(events, "evaluation"),
        test=_test_since_last_start(events),
        result=readable(read_result),
        mistakes=readable(read_mistakes),
        problems=problems,
    )


def images_of(event: Event) -> str:
    """Return which images an `evaluation` or `test` event is about: "validation" or "test"."""
    return "validation" if "validation_accuracy" in event else "test"


def _test_since_last_start(events: list[Event]) -> Event | None:
    last = next((event for event in reversed(events) if event["event"] in ("start", "test")), None)
    return last if last and last["event"] == "test" else None


def _without_repeated_steps(events: list[Event], kind: str) -> list[Event]:
    """Return the events of one kind, without events for steps that were repeated after a later start."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":
            while kept and kept[-1]["step"] > event["step"]:
                kept.pop()
        elif event["event"] == kind:
            while kept and kept[-1]["step"] >= event["step"]:  # a full disk has lost the start between them
                kept.pop()
            kept.append(event)
    return kept
