"""Write `report.html`: one run, or several side by side, on a page that needs no network."""

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import escape
from PIL import Image

from ..common.atomic_write import written_aside
from ..config import MNIST_SHAPE, ImageShape
from ..errors import OutputError, reason, write_line
from ..runs.layout import require_overwritable
from ..runs.record import Record, images_of, read
from ..runs.timeline import timeline
from . import report_data
from .console import make_console, print_json

_MARKER = b'<div id="tooltip"></div>'
"""Part of every page. It distinguishes a report from a user's other files."""


def run(*, runs: Sequence[Path], out: Path | None, as_json: bool) -> int:
    """Run `dmnist report`: write the page of the runs in these folders, and return the exit code.

    What is damaged is left out, and named on standard error and on the page. Raises `UsageError` for a
    folder without a run, `OutputError` if the page cannot be written.
    """
    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    records = [read(folder) for folder in runs]
    write(records, out)
    for record in records:
        for problem in record.problems:
            write_line(f"left out of the report: {problem}")
    if as_json:
        print_json({"runs": [str(folder) for folder in runs], "out": str(out)})
    else:
        make_console().print(str(out), soft_wrap=True)
    return 0


@dataclass(frozen=True)
class Report:
    """A report's page, which a notebook shows in a frame of its own."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        style = "width: 100%; height: 600px; border: 0"
        return f'<iframe srcdoc="{escape(self.html)}" style="{style}"></iframe>'


def write(records: Sequence[Record], out: Path) -> None:
    """Write the page of these runs.

    Raises `OutputError`, also if there is a file at `out` that is not a report.
    """
    require_overwritable(out, _MARKER, "report")
    page = render(records)
    try:
        with written_aside(out) as part:
            # A folder's name need not be UTF-8.
            part.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{out}: {reason(error)}") from None


def render(records: Sequence[Record]) -> str:
    """Return the page as HTML. All text from a run's files is escaped."""
    runs = [_template_values(record) for record in records]
    several = len(records) > 1
    return _template().render(
        title=" and ".join(run["name"] for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=runs,
        charts=report_data.charts(records) if several else [],
        differing=report_data.differing(records) if several else [],
    )


@functools.cache
def _template() -> Template:
    text = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


def _template_values(record: Record) -> dict[str, Any]:
    """Return the values that the template shows for a run."""
    last = record.scored
    images = images_of(last) if last else "test"
    result = record.result if record.state == "finished" else None
    parts = report_data.parts_of_a_step(record)
    mistakes = record.mistakes
    if not (mistakes and last and (mistakes["step"], mistakes["images"]) == (last["step"], images)):
        mistakes = {"mistakes": [], "image_shape": MNIST_SHAPE}  # none yet, or those of repeated steps
    validated = [event for event in record.evaluations if "validation_accuracy" in event]
    return {
        "name": report_data.name_of(record),
        "state": record.state,
        "step": record.steps[-1]["step"] if record.steps else 0,
        "total": record.starts[-1]["steps"] if record.starts else 0,
        "images": images,
        "scores": {
            name: last[f"{images}_{name}"] if last else None for name in ("accuracy", "loss", "images")
        },
        "best": max(validated, key=lambda event: event["validation_accuracy"], default=None),
        "result": result,
        "starts": len(record.starts),
        "charts": report_data.charts([record]),
        "parts": parts,
        "whole_step": sum(value for _, value in parts) or 1.0,
        "classes": report_data.classes(record),
        "wrong": round(last[f"{images}_images"] * (1 - last[f"{images}_accuracy"])) if last else 0,
        "mistakes": [
            {
                "picture": data_url(base64.b64decode(mistake["image"]), mistakes["image_shape"]),
                "label": record.class_name(mistake["label"]),
                "predicted": record.class_name(mistake["predicted"]),
                "confidence": mistake["confidence"],
                "index": mistake["index"],
            }
            for mistake in mistakes["mistakes"]
        ],
        "recipe": record.config.get("recipe", {}),
        "facts": report_data.facts(record),
        "time_line": timeline(record),
        "problems": record.problems,
    }


def picture_of(pixels: bytes, shape: ImageShape) -> Image.Image:
    """Return the picture with these bytes, `(h, w)` or in colour `(h, w, 3)`."""
    channels, height, width = shape
    return Image.frombytes("RGB" if channels == 3 else "L", (width, height), pixels)


def data_url(pixels: bytes, shape: ImageShape) -> str:
    """Encode a picture as the data URL of a PNG (RFC 2397), so that the page contains it."""
    file = io.BytesIO()
    picture_of(pixels, shape).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
