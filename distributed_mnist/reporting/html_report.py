"""`report.html`: a run, or several side by side, on one page that opens anywhere without a network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ..common.atomic_write import written_aside
from ..errors import OutputError, reason
from ..runs.record import Record
from ..runs.timeline import timeline
from . import report_data


def write(records: Sequence[Record], out: Path) -> None:
    """Write the page of these runs. Raises `OutputError`."""
    page = render(records)
    try:
        with written_aside(out) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: {reason(error)}") from None


def render(records: Sequence[Record]) -> str:
    """The page as HTML. Whatever comes from a run's files is escaped."""
    template = (Path(__file__).with_name("report.html.jinja")).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = [_shown(record) for record in records]
    several = len(records) > 1
    return environment.from_string(template).render(
        title=" and ".join(run["name"] for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=runs,
        charts=report_data.charts(records) if several else [],
        differing=report_data.differing(records) if several else [],
    )


def _shown(record: Record) -> dict[str, Any]:
    """A run as the template takes it."""
    last = record.evaluations[-1] if record.evaluations else None
    result = record.result if record.state == "finished" else None
    parts = report_data.parts_of_a_step(record)
    mistakes = record.mistakes or {}
    if last is None or mistakes.get("step") != last["step"]:  # of steps that were taken again, or none yet
        mistakes = {"mistakes": []}
    return {
        "name": report_data.name_of(record),
        "state": record.state,
        "step": record.steps[-1]["step"] if record.steps else 0,
        "total": record.starts[-1]["steps"] if record.starts else 0,
        "evaluation": last,
        "result": result,
        "starts": len(record.starts),
        "charts": report_data.charts([record]),
        "parts": parts,
        "whole_step": sum(value for _, value in parts) or 1.0,
        "classes": report_data.classes(record),
        "wrong": round(last["test_images"] * (1 - last["test_accuracy"])) if last else 0,
        "mistakes": [
            {
                "picture": picture(base64.b64decode(each["image"])),
                "label": record.class_name(each["label"]),
                "predicted": record.class_name(each["predicted"]),
                "confidence": each["confidence"],
                "index": each["index"],
            }
            for each in mistakes["mistakes"]
        ],
        "recipe": record.config.get("recipe", {}),
        "facts": report_data.facts(record),
        "time_line": timeline(record),
    }


def picture(pixels: bytes) -> str:
    """28 by 28 grey bytes as the address of a PNG that is part of the page (RFC 2397)."""
    file = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
