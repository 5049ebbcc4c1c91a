"""What happened to a run and when, as lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import resume_flags
from .record import Event, Record

_MOST_EVALUATIONS = 20
"""That have a line each."""


@dataclass(frozen=True)
class TimelineEvent:
    """Something of the time line: seconds since the run began, its kind, and what is told of it."""

    seconds: float
    kind: str
    text: str


def timeline(record: Record) -> list[TimelineEvent]:
    """Starts, restarts, stops, notices, evaluations and the end, in order; checkpoints, and evaluations
    where there are many, as one line a stretch of them."""
    if not record.events:
        return []
    evaluations = sum(event["event"] == "evaluation" for event in record.events)
    grouped = {"checkpoint"} | ({"evaluation"} if evaluations > _MOST_EVALUATIONS else set())
    began, found = record.events[0]["time"], list[TimelineEvent]()
    step, stretch = 0, dict[str, list[Event]]()
    for event in record.events:
        kind, seconds = event["event"], event["time"] - began
        if kind in grouped:
            stretch.setdefault(kind, []).append(event)
        elif kind == "steps":
            step = event["step"]
        elif kind == "evaluation":
            found.append(TimelineEvent(seconds, kind, _evaluation(event)))
        else:
            found += _together(stretch, seconds)
            stretch = {}
            found.append(_event(event, seconds, step))
    last = record.events[-1]["time"] - began
    found += _together(stretch, last)
    if record.state == "stopped":
        found.append(
            TimelineEvent(
                last, "fault", f"stopped after step {step}; go on with {resume_flags(record.path)}"
            )
        )
    return found


def hosts_of(start: Event) -> str:
    """Of the processes that a `start` event tells of, the first few."""
    hosts = list(dict.fromkeys(rank["host"] for rank in start.get("ranks", [])))
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _event(event: Event, seconds: float, step: int) -> TimelineEvent:
    """Of one that is told by itself; `step` is the last that was taken before."""
    kind = event["event"]
    if kind == "start":
        size, at = event["world_size"], event["step"]
        group = f"{size} process{'es' if size > 1 else ''} on {hosts_of(event)}"
        if event.get("again"):
            return TimelineEvent(
                seconds, "fault", f"started again after step {step}: {group}, from step {at}"
            )
        return TimelineEvent(seconds, kind, f"started: {group}" + (f", from step {at}" if at else ""))
    if kind == "stop":
        return TimelineEvent(seconds, "fault", f"asked to stop, after step {event['step']}")
    if kind == "end":
        return TimelineEvent(seconds, kind, f"ended after step {event['result']['steps']}")
    return TimelineEvent(seconds, kind, event.get("text", ""))


def _evaluation(event: Event) -> str:
    text = f"step {event['step']}: test accuracy {event['test_accuracy']:.2%}"
    return text + (", the best so far" if event["best"] else "")


def _together(stretch: dict[str, list[Event]], seconds: float) -> list[TimelineEvent]:
    found = []
    if evaluations := stretch.get("evaluation"):
        found.append(TimelineEvent(seconds, "evaluation", _evaluations(evaluations)))
    if checkpoints := stretch.get("checkpoint"):
        found.append(
            TimelineEvent(seconds, "checkpoint", _checkpoints([event["step"] for event in checkpoints]))
        )
    return found


def _evaluations(events: Sequence[Event]) -> str:
    if len(events) == 1:
        return _evaluation(events[0])
    steps = f"at steps {events[0]['step']} to {events[-1]['step']}"
    best = max(event["test_accuracy"] for event in events)
    told = f"test accuracy {events[-1]['test_accuracy']:.2%} at the last, {best:.2%} at best"
    return f"{len(events)} evaluations, {steps}: {told}"


def _checkpoints(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"checkpoint at step {steps[0]}"
    return f"{len(steps)} checkpoints, at steps {steps[0]} to {steps[-1]}"
