"""`dmnist report`: the page of runs, made from their files at any time."""

from collections.abc import Sequence
from pathlib import Path

from ..runs.record import read
from . import html_report
from .console import make_console, print_json


def run(*, runs: Sequence[Path], out: Path | None, as_json: bool) -> int:
    """Write the page of these runs; the exit code.

    Raises `UsageError` for a folder that is no run's, `OutputError`."""
    records = [read(folder) for folder in runs]
    out = out or (runs[0] / "report.html" if len(records) == 1 else Path("report.html"))
    html_report.write(records, out)
    if as_json:
        print_json({"runs": [str(folder) for folder in runs], "out": str(out)})
    else:
        make_console().print(str(out), soft_wrap=True)
    return 0
