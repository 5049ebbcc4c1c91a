"""Describe the events of a run as lines of text with times."""

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import resume_flags
from .record import Event, Record, images_of

_MAX_SINGLE_EVALUATIONS = 20
"""If a run has more evaluations than this, they are summarised."""


@dataclass(frozen=True)
class TimelineEvent:
    """One line of the timeline: seconds since the run began, kind of event, and text."""

    seconds: float
    kind: str
    text: str


def timeline(record: Record) -> list[TimelineEvent]:
    """Return the starts, restarts, stops, notices, evaluations and the end of a run, in order.

    Checkpoints between two other events are summarised in one line. So are evaluations if there are many.
    """
    if not record.events:
        return []
    evaluations = sum(event["event"] == "evaluation" for event in record.events)
    summarised = {"checkpoint"} | ({"evaluation"} if evaluations > _MAX_SINGLE_EVALUATIONS else set())
    began, lines = record.events[0]["time"], list[TimelineEvent]()
    step, interval = 0, dict[str, list[Event]]()  # `interval`: events to summarise since the last line
    for event in record.events:
        kind, seconds = event["event"], event["time"] - began
        if kind in summarised:
            interval.setdefault(kind, []).append(event)
        elif kind == "steps":
            step = event["step"]
        elif kind == "evaluation":
            lines.append(TimelineEvent(seconds, kind, _describe_evaluation(event)))
        else:
            lines += _summarise(interval, seconds)
            interval = {}
            lines.append(_describe(event, seconds, step))
    end = record.events[-1]["time"] - began
    lines += _summarise(interval, end)
    if record.state == "stopped":
        text = f"stopped after step {step}; resume with {resume_flags(record.path)}"
        lines.append(TimelineEvent(end, "fault", text))
    return lines


def hosts_of(start: Event) -> str:
    """Return the first few hosts in a `start` event, for messages."""
    hosts = list(dict.fromkeys(rank["host"] for rank in start.get("ranks", [])))
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _describe(event: Event, seconds: float, step: int) -> TimelineEvent:
    """Return the line for an event that is not summarised; `step` is the last step before it."""
    kind = event["event"]
    if kind == "start":
        size, first = event["world_size"], event["step"]
        group = f"{size} process{'es' if size > 1 else ''} on {hosts_of(event)}"
        if event.get("again"):
            text = f"restarted after step {step}: {group}, from step {first}"
            return TimelineEvent(seconds, "fault", text)
        return TimelineEvent(seconds, kind, f"started: {group}" + (f", from step {first}" if first else ""))
    if kind == "test":
        text = f"result, from step {event['step']}: test accuracy {event['test_accuracy']:.2%}"
        return TimelineEvent(seconds, "evaluation", text)
    if kind == "stop":
        return TimelineEvent(seconds, "fault", f"stop requested, after step {event['step']}")
    if kind == "end":
        return TimelineEvent(seconds, kind, f"ended after step {event['result']['steps']}")
    return TimelineEvent(seconds, kind, event.get("text", ""))


def _describe_evaluation(event: Event) -> str:
    images = images_of(event)
    text = f"step {event['step']}: {images} accuracy {event[f'{images}_accuracy']:.2%}"
    return text + (", the best so far" if event["best"] else "")


def _summarise(interval: dict[str, list[Event]], seconds: float) -> list[TimelineEvent]:
    lines = []
    if evaluations := interval.get("evaluation"):
        lines.append(TimelineEvent(seconds, "evaluation", _summarise_evaluations(evaluations)))
    if checkpoints := interval.get("checkpoint"):
        steps = [event["step"] for event in checkpoints]
        lines.append(TimelineEvent(seconds, "checkpoint", _summarise_checkpoints(steps)))
    return lines


def _summarise_evaluations(events: Sequence[Event]) -> str:
    if len(events) == 1:
        return _describe_evaluation(events[0])
    steps = f"at steps {events[0]['step']} to {events[-1]['step']}"
    images = images_of(events[-1])
    accuracies = [event[f"{images_of(event)}_accuracy"] for event in events]
    return (
        f"{len(events)} evaluations, {steps}: "
        f"last {images} accuracy {accuracies[-1]:.2%}, best {max(accuracies):.2%}"
    )


def _summarise_checkpoints(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"checkpoint at step {steps[0]}"
    return f"{len(steps)} checkpoints, at steps {steps[0]} to {steps[-1]}"
