"""Show the results of `dmnist verify`: a line for each run as it ends, then PASS or what failed."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import VerificationError
from ..reporting.console import make_console, print_json, print_labelled

_NAME_WIDTH = 30


@dataclass(frozen=True)
class Row:
    """The result of one run. The fields are those of `runs` in `--json`."""

    what: str
    """The name of the run."""
    good: bool
    verdict: str
    """A word or two if the run is good, otherwise the problem."""
    weights_sha256: str | None
    seconds: float


class ResultsTable:
    """Collects the results and prints each as it arrives.

    Attributes: `problems` (one line for each thing that is wrong), `json_fields` (what `--json` prints
    besides the runs).
    """

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console, self._as_json = console, as_json
        self._rows: list[Row] = []
        self.problems: list[str] = []
        self.json_fields: dict[str, Any] = {}

    @classmethod
    def make(cls, *, as_json: bool, shown: bool = True) -> "ResultsTable":
        """Make a table that prints, or with `shown=False` one for a rank that prints nothing."""
        if not shown:
            return cls(Console(quiet=True), as_json=False)
        return cls(make_console(stderr=as_json), as_json=as_json)

    def print_line(self, text: str, style: str = "") -> None:
        """Print a line outside the table."""
        self._print(Text(text, style))

    def header(self, title: str) -> None:
        """Print the column names, with `title` over the first column."""
        line = f"\n  {title:<{_NAME_WIDTH}} {'weights sha256':<14} {'seconds':>7}  result"
        self.print_line(line, "bold")

    def busy(self, activity: str) -> contextlib.AbstractContextManager[Any]:
        """Show the current activity on a terminal until the block ends."""
        return self._console.status(activity)

    def add(self, what: str, sha256: str | None, seconds: float, problem: object, good: str) -> None:
        """Print the row of a run, which says its `problem`, or `good` if it has none.

        `sha256` is the digest of the weights.
        """
        row = Row(what, not problem, str(problem or good), sha256, seconds)
        self._rows.append(row)
        mark, style = ("✓", "green") if row.good else ("✗", "bold red")
        label = Text.assemble(
            (mark, style),
            f" {row.what:<{_NAME_WIDTH}} ",
            (f"{(row.weights_sha256 or '-')[:12]:<14}", "cyan"),
            f" {row.seconds:>7.1f}  ",
        )
        print_labelled(self._console, label, Text(row.verdict, style), len(label))

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        """Make a temporary folder. It is kept if there are problems, so that a person can examine it."""
        folder = Path(tempfile.mkdtemp(prefix="dmnist-verify-"))
        try:
            yield folder
        finally:
            if self.problems:
                self.json_fields["kept"] = str(folder)
                self.print_line(f"\nkept      {folder}", "yellow")
            else:
                rmtree(folder, ignore_errors=True)

    def conclude(self) -> None:
        """Print PASS, or FAIL and all problems. Raises `VerificationError` if there are problems."""
        self.print_line("")
        if not self.problems:
            self.print_line("PASS", "bold green")
        for text in self.problems:
            print_labelled(self._console, Text.assemble(("FAIL", "bold red"), "  "), Text(text), column=6)
        if self._as_json:
            runs = [asdict(row) for row in self._rows]
            passed = not self.problems
            print_json({"passed": passed, "wrong": self.problems, "runs": runs, **self.json_fields})
        if self.problems:
            raise VerificationError("not verified: see the lines above marked FAIL")

    def _print(self, text: Text) -> None:
        """Print a line. A terminal gets it wrapped between words; a file gets it whole."""
        self._console.print(text, soft_wrap=not self._console.is_terminal)
