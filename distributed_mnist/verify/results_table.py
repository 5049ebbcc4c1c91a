"""What `dmnist verify` shows and returns: one line a run, as each ends, and above all how it came out."""

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
from ..reporting.console import make_console, print_json

_WIDE = 36


@dataclass(frozen=True)
class Row:
    """How one run came out."""

    what: str
    good: bool
    verdict: str
    """In a word or two where it is good; otherwise what is wrong."""
    weights_sha256: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class ResultsTable:
    """Where it is shown.

    Attributes: `wrong` (what is, one line each), `fields` (what `--json` prints besides the runs).
    """

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console, self._as_json = console, as_json
        self._rows: list[Row] = []
        self.wrong: list[str] = []
        self.fields: dict[str, Any] = {}

    @classmethod
    def make(cls, *, as_json: bool, shown: bool = True) -> "ResultsTable":
        """One that people see, or (`shown` is false) one of a rank that says nothing."""
        if not shown:
            return cls(Console(quiet=True), as_json=False)
        return cls(make_console(stderr=as_json), as_json=as_json)

    def say(self, text: str, style: str = "") -> None:
        """A line by itself."""
        self._console.print(Text(text, style), soft_wrap=True)

    def head(self, what: str) -> None:
        """The head of a table."""
        line = f"\n  {what:<{_WIDE}} {'weights sha256':<14} {'seconds':>7}  result"
        self.say(line, "bold")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While something is under way, on a terminal."""
        with self._console.status(what):
            yield

    def add(self, row: Row) -> None:
        """A line of the table."""
        self._rows.append(row)
        mark, style = ("✓", "green") if row.good else ("✗", "bold red")
        line = Text.assemble(
            (mark, style),
            f" {row.what:<{_WIDE}} ",
            (f"{(row.weights_sha256 or '-')[:12]:<14}", "cyan"),
            f" {row.seconds:>7.1f}  ",
            (row.verdict, style),
        )
        self._console.print(line, soft_wrap=True)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """A temporary folder, which stays if something is wrong."""
        folder = Path(tempfile.mkdtemp(prefix="dmnist-verify-"))
        try:
            yield folder
        finally:
            if self.wrong:
                self.fields["kept"] = str(folder)
                self.say(f"\nkept      {folder}", "yellow")
            else:
                rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """PASS, or FAIL and all that is wrong. Raises `VerificationError` if anything is."""
        self.say("")
        if not self.wrong:
            self.say("PASS", "bold green")
        for text in self.wrong:
            self._console.print(Text.assemble(("FAIL", "bold red"), f"  {text}"), soft_wrap=True)
        if self._as_json:
            runs = [row.to_dict() for row in self._rows]
            print_json({"passed": not self.wrong, "wrong": self.wrong, "runs": runs, **self.fields})
        if self.wrong:
            raise VerificationError("not verified: what is wrong stands above, marked FAIL")
