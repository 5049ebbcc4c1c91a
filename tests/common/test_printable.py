"""Text from files must not control the terminal."""

import io
import sys

import pytest
from rich.table import Table

from distributed_mnist.common.printable import printable
from distributed_mnist.errors import write_line
from distributed_mnist.reporting.console import make_console

HOSTILE = "a\x1b[2J\x1b]0;title\x07 \x9b31m \u202e b\udcff ü"
SAFE = "a\\x1b[2J\\x1b]0;title\\x07 \\x9b31m \\u202e b\\udcff ü"


def test_control_characters_are_escapes() -> None:
    assert printable(HOSTILE) == SAFE
    assert printable("plain\ttext\nü – 数") == "plain\ttext\nü – 数"  # noqa: RUF001


def test_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    write_line(HOSTILE)
    assert capsys.readouterr().err == f"dmnist: {SAFE}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_all_that_a_console_prints(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding=encoding))
    console = make_console()
    table = Table("name")
    table.add_row(HOSTILE)
    for shown in (HOSTILE, table):
        console.print(shown, soft_wrap=True)
    sys.stdout.flush()
    text = file.getvalue().decode(encoding)
    assert "\x1b" not in text
    assert "a\\x1b[2J" in text
    assert "\udcff" not in text
    assert ("ü" if encoding == "utf-8" else "\\xfc") in text
