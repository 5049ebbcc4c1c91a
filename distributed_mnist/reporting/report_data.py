"""Compute the content of a report from a run's record: curves, tables and facts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from ..config import UNUSED_IN_EXACT
from ..runs.record import Event, Record, images_of
from ..runs.timeline import hosts_of
from .charts import Line, line_chart, smoothed
from .confusion import per_class
from .stragglers import uneven

_PARTS = ("data", "forward", "backward", "optimizer", "graph", "exchange")
_MANY_RANKS = 8


@dataclass(frozen=True)
class Chart:
    """A chart with its heading, and the color number and name of each line."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]]


def name_of(record: Record) -> str:
    """Return the name of a run, which is the name of its folder."""
    return record.path.resolve().name


def charts(records: Sequence[Record]) -> list[Chart]:
    """Draw the curves of one run, or those of several runs in the same charts."""
    names = [name_of(record) for record in records]
    single = len(records) == 1

    def make_chart(title: str, lines: list[Line], y: Callable[[float], str], *, log: bool = False) -> Chart:
        svg = line_chart(lines, x="epoch", y=y, log=log, title=title)
        legend = [(line.color, line.name) for line in lines if not line.faint and line.points]
        return Chart(title, svg, legend)

    loss, accuracy, rate, speed = [], [], [], []
    evaluated = list[str]()
    for i, record in enumerate(records):
        raw, color = _losses(record), i
        mean = smoothed(raw, max(1, len(raw) // 60))
        loss.append(Line("each step", raw, color, faint=True))
        loss.append(Line("train" if single else names[i], mean, color))
        evaluations = record.evaluations
        images = images_of(evaluations[-1]) if evaluations else "test"
        evaluated.append(images)
        points = _evaluated(evaluations, f"{images}_loss")
        loss.append(Line(images, points, color + single, dots=True, faint=not single))
        if single:
            accuracy.append(Line("train", _evaluated(evaluations, "train_accuracy"), color, dots=True))
        points = _evaluated(evaluations, f"{images}_accuracy")
        accuracy.append(Line(images if single else names[i], points, color + single, dots=True))
        if single and record.test:
            loss.append(Line("test", _evaluated([record.test], "test_loss"), color + 2, dots=True))
            accuracy.append(Line("test", _evaluated([record.test], "test_accuracy"), color + 2, dots=True))
        rate.append(Line(names[i], _stepped(record, "lr"), color))
        speed.append(Line(names[i], _stepped(record, "images_per_second"), color))
    which = " or ".join(dict.fromkeys(evaluated))
    loss_title = "Loss" if single else f"Training loss ({which}: faint dots)"
    drawn = [
        make_chart(loss_title, loss, "{:.3g}".format, log=True),
        make_chart("Accuracy" if single else f"{which.capitalize()} accuracy", accuracy, "{:.4g} %".format),
        make_chart("Learning rate", rate, "{:.2g}".format),
        make_chart("Images per second", speed, _thousands),
    ]
    if single:
        of_ranks = [("A rank's step: computing, ms", "busy", 1e3)]
        if len(records[0].starts[-1].get("ranks", []) if records[0].starts else []) > 1:
            of_ranks.append(("A rank's step: exchange and waiting, ms", "exchange", 1e3))
        if any(uneven(event.get("ranks", {}).get("share", ())) for event in records[0].steps):
            of_ranks.append(("A rank's part of a batch, %", "share", 1e2))
        drawn += [
            make_chart(title, _ranks(records[0], field, factor), "{:.3g}".format)
            for title, field, factor in of_ranks
        ]
    return [
        Chart(chart.title, chart.svg, chart.legend if len(chart.legend) > 1 else [])
        for chart in drawn
        if chart.svg
    ]


def parts_of_a_step(record: Record) -> list[tuple[str, float]]:
    """Return the name and the mean milliseconds of each part of a step on rank 0."""
    # The first interval is one step that warms everything up.
    counted = record.steps[1:] or record.steps
    weights = [len(event["losses"]) for event in counted]
    found = []
    for part in _PARTS:
        seconds = [event["seconds"].get(part, 0.0) for event in counted]
        total = sum(weight * value for weight, value in zip(weights, seconds, strict=True))
        if total:
            found.append((part, 1e3 * total / sum(weights)))
    return found


def classes(record: Record) -> list[dict[str, Any]]:
    """Return for each class the fields of `confusion.per_class`, and its `row` of the confusion matrix."""
    if record.scored is None or "confusion" not in record.scored:
        return []
    confusion = record.scored["confusion"]
    names = [record.class_name(i) for i in range(len(confusion))]
    rows = zip(per_class(confusion, names), confusion, strict=True)
    return [{**scores, "row": row} for scores, row in rows]


def facts(record: Record) -> list[tuple[str, str]]:
    """Return facts about a run as (label, text): what ran, where and when."""
    last = record.starts[-1] if record.starts else {}
    first, lines = (record.starts or [{}])[0], last.get("lines", {})
    versions = record.config.get("versions", {})
    began = datetime.fromtimestamp(record.events[0]["time"], UTC) if record.events else None
    found = {
        "recipe": first.get("lines", {}).get(
            "recipe", ""
        ),  # a resumed run says what it resumed instead of the recipe's name
        "data": lines.get("data", ""),
        "processes": lines.get("world", ""),
        "hosts": hosts_of(last) if last else "",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value),
        "began": f"{began:%Y-%m-%d %H:%M:%S} UTC" if began else "",
        "folder": str(record.path),
    }
    return [(key, value) for key, value in found.items() if value]


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return the recipe fields in which the runs differ, with the value of each run.

    A field that changes nothing in a run's precision has no value.
    """
    recipes = [_used(record.config.get("recipe", {})) for record in records]
    fields = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(field, [str(recipe.get(field, "–")) for recipe in recipes]) for field in fields]  # noqa: RUF001
    return [row for row in rows if len(set(row[1])) > 1]


def _used(recipe: dict[str, Any]) -> dict[str, Any]:
    unused = UNUSED_IN_EXACT if recipe.get("precision") == "exact" else ()
    return {field: value for field, value in recipe.items() if field not in unused}


def _losses(record: Record) -> list[tuple[float, float]]:
    """Return (epoch, training loss) of each step."""
    points = []
    for event in record.steps:
        steps_per_epoch = event["step"] / event["epoch"]
        first = event["first_step"]
        points += [((first + i) / steps_per_epoch, loss) for i, loss in enumerate(event["losses"])]
    return points


def _stepped(record: Record, field: str) -> list[tuple[float, float]]:
    return [(event["epoch"], event[field]) for event in record.steps]


def _evaluated(events: Sequence[Event], field: str) -> list[tuple[float, float]]:
    factor = 100 if field.endswith("accuracy") else 1
    return [(event["epoch"], factor * event[field]) for event in events if field in event]


def _ranks(record: Record, field: str, factor: float) -> list[Line]:
    """Return one line per rank, `factor` times the field; for many ranks the least, median and most."""
    events = [event for event in record.steps[1:] or record.steps if field in event.get("ranks", {})]
    sizes = {len(event["ranks"][field]) for event in events}
    if len(sizes) == 1 and max(sizes) <= _MANY_RANKS:
        return [
            Line(
                f"rank {rank}",
                [(event["epoch"], factor * event["ranks"][field][rank]) for event in events],
                rank,
            )
            for rank in range(max(sizes))
        ]
    quantiles = {"least": 0.0, "median": 0.5, "most": 1.0}
    return [
        Line(
            name,
            [
                (
                    event["epoch"],
                    factor * sorted(event["ranks"][field])[_index(quantile, event["ranks"][field])],
                )
                for event in events
            ],
            color,
        )
        for color, (name, quantile) in enumerate(quantiles.items())
    ]


def _thousands(value: float) -> str:
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


def _index(quantile: float, values: Sequence[float]) -> int:
    return round(quantile * (len(values) - 1))
