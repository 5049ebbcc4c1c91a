"""`dmnist report`: the page of runs, made from their files at any time."""

from pathlib import Path

from . import report
from .console import make_console, print_json
from .flags_use import Report
from .record import read


def command(flags: Report) -> int:
    """The exit code. Raises `UsageError` for a folder that is no run's, `OutputError`."""
    records = [read(folder) for folder in flags.runs]
    out = flags.out or (flags.runs[0] / "report.html" if len(records) == 1 else Path("report.html"))
    report.write(records, out)
    if flags.json:
        print_json({"runs": [str(folder) for folder in flags.runs], "out": str(out)})
    else:
        make_console().print(str(out), soft_wrap=True)
    return 0
