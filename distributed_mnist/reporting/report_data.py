"""What a report shows of a run, worked out of its record: curves, tables, and what happened when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from ..runs.record import Record
from ..runs.timeline import hosts_of
from .charts import Line, line_chart, smoothed
from .confusion import per_class

_PARTS = ("data", "forward", "backward", "optimizer", "exchange")
_MANY_RANKS = 8


@dataclass(frozen=True)
class Chart:
    """A picture with its heading and the names of its lines by colour."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]]


def name_of(record: Record) -> str:
    """What a run is called: its folder's name."""
    return record.path.resolve().name


def charts(records: Sequence[Record]) -> list[Chart]:
    """The curves of one run, or of several in one picture each."""
    names = [name_of(record) for record in records]
    single = len(records) == 1

    def of(title: str, lines: list[Line], y: Callable[[float], str], *, log: bool = False) -> Chart:
        svg = line_chart(lines, x="epoch", y=y, log=log, title=title)
        shown = [(line.color, line.name) for line in lines if not line.faint and line.points]
        return Chart(title, svg, shown)

    loss, accuracy, rate, speed = [], [], [], []
    for i, record in enumerate(records):
        raw, color = _losses(record), i
        mean = smoothed(raw, max(1, len(raw) // 60))
        loss.append(Line("each step", raw, color, faint=True))
        loss.append(Line("train" if single else names[i], mean, color))
        tested = _evaluated(record, "test_loss")
        loss.append(Line("test", tested, color + single, dots=True, faint=not single))
        right = _evaluated(record, "test_accuracy")
        accuracy.append(Line("test" if single else names[i], right, color + single, dots=True))
        if single:
            accuracy.append(Line("train", _evaluated(record, "train_accuracy"), color, dots=True))
        rate.append(Line(names[i], _stepped(record, "lr"), color))
        speed.append(Line(names[i], _stepped(record, "images_per_second"), color))
    found = [
        of("Loss" if single else "Training loss (test: faint dots)", loss, "{:.3g}".format, log=True),
        of("Accuracy" if single else "Test accuracy", accuracy, "{:.4g} %".format),
        of("Learning rate", rate, "{:.2g}".format),
        of("Images per second", speed, lambda each: f"{each / 1000:g} k" if each >= 1000 else f"{each:g}"),
    ]
    if single:
        found += [
            of("A rank's step: computing, ms", _ranks(records[0], "busy"), "{:.3g}".format),
            of("A rank's step: exchange and waiting, ms", _ranks(records[0], "exchange"), "{:.3g}".format),
        ]
        if len(records[0].starts[-1].get("ranks", []) if records[0].starts else []) < 2:
            found.pop()
    return [
        Chart(chart.title, chart.svg, chart.legend if len(chart.legend) > 1 else [])
        for chart in found
        if chart.svg
    ]


def parts_of_a_step(record: Record) -> list[tuple[str, float]]:
    """Mean milliseconds of each part of a step on rank 0, of what it recorded."""
    # The first stretch is one step that warms everything up.
    counted = record.steps[1:] or record.steps
    weights = [len(event["losses"]) for event in counted]
    found = []
    for part in _PARTS:
        told = [event["seconds"].get(part, 0.0) for event in counted]
        total = sum(weight * value for weight, value in zip(weights, told, strict=True))
        if total:
            found.append((part, 1e3 * total / sum(weights)))
    return found


def classes(record: Record) -> list[dict[str, Any]]:
    """For each class what `confusion.per_class` tells, and its `row` of the confusion matrix."""
    if not record.evaluations or "confusion" not in record.evaluations[-1]:
        return []
    confusion = record.evaluations[-1]["confusion"]
    told = per_class(confusion, [record.class_name(i) for i in range(len(confusion))])
    return [{**one, "row": row} for one, row in zip(told, confusion, strict=True)]


def facts(record: Record) -> list[tuple[str, str]]:
    """What ran where, and when."""
    last = record.starts[-1] if record.starts else {}
    first, lines = (record.starts or [{}])[0], last.get("lines", {})
    versions = record.config.get("versions", {})
    began = datetime.fromtimestamp(record.events[0]["time"], UTC) if record.events else None
    found = {
        "recipe": first.get("lines", {}).get("recipe", ""),  # by its name; one that goes on says of what
        "data": lines.get("data", ""),
        "processes": lines.get("world", ""),
        "hosts": hosts_of(last) if last else "",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "began": f"{began:%Y-%m-%d %H:%M:%S} UTC" if began else "",
        "folder": str(record.path),
    }
    return [(key, value) for key, value in found.items() if value]


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Recipe fields in which runs differ, with each run's value."""
    recipes = [record.config.get("recipe", {}) for record in records]
    fields = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(field, [str(recipe.get(field, "–")) for recipe in recipes]) for field in fields]  # noqa: RUF001
    return [row for row in rows if len(set(row[1])) > 1]


def _losses(record: Record) -> list[tuple[float, float]]:
    """Each step's training loss, by epoch."""
    points = []
    for event in record.steps:
        per_epoch = event["step"] / event["epoch"]
        first = event["first_step"]
        points += [((first + i) / per_epoch, loss) for i, loss in enumerate(event["losses"])]
    return points


def _stepped(record: Record, field: str) -> list[tuple[float, float]]:
    return [(event["epoch"], event[field]) for event in record.steps]


def _evaluated(record: Record, field: str) -> list[tuple[float, float]]:
    factor = 100 if field.endswith("accuracy") else 1
    return [(event["epoch"], factor * event[field]) for event in record.evaluations]


def _ranks(record: Record, field: str) -> list[Line]:
    """A line a rank, in ms a step; of many ranks the fastest, the middle and the slowest."""
    told = [event for event in record.steps[1:] or record.steps if "ranks" in event]
    sizes = {len(event["ranks"][field]) for event in told}
    if len(sizes) == 1 and max(sizes) <= _MANY_RANKS:
        by_rank = [(f"rank {rank}", rank) for rank in range(max(sizes))]
        return [
            Line(name, [(event["epoch"], 1e3 * event["ranks"][field][rank]) for event in told], rank)
            for name, rank in by_rank
        ]
    places = {"least": 0.0, "median": 0.5, "most": 1.0}
    return [
        Line(
            name,
            [
                (event["epoch"], 1e3 * sorted(event["ranks"][field])[_place(share, event["ranks"][field])])
                for event in told
            ],
            color,
        )
        for color, (name, share) in enumerate(places.items())
    ]


def _place(share: float, values: Sequence[float]) -> int:
    return round(share * (len(values) - 1))
