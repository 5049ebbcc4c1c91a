"""The command line is an interface: removing a flag breaks users' scripts. Each change must be deliberate.

After a deliberate change, run `UPDATE_GOLDEN=1 pytest tests/cli/test_command_line_frozen.py` and review the
difference.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY

from distributed_mnist.cli.parser import parse

ROOT = REPOSITORY
GOLDEN = Path(__file__).with_name("command_line_frozen.txt")
COMMANDS = [
    "",
    "train",
    "evaluate",
    "export",
    "verify",
    "data",
    "data fetch",
    "data check",
    "data import",
    "data generate",
]
# Flags that scripts may rely on, whatever the golden file says.
PROMISED = (
    "--recipe --dataset --data --model --epochs --batch-size --lr --seed --nproc --sync --shards "
    "--precision --out --resume --checkpoint-every --json"
)
ORIGINAL = (
    "--root -j --workers --epochs --start-epoch --batch-size --lr --learning-rate --momentum --wd "
    "--weight-decay --resume -e --evaluate --backend --local_rank -i --init-method -s --world-size "
    "-r --rank --seed -h --help"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def usage(command: str, stream: type[io.StringIO] = io.StringIO) -> str:
    shown = stream()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        parse([*command.split(), "--help"])
    return shown.getvalue()


def flags_in(text: str) -> list[str]:
    """The flags at the start of lines of help."""
    lines = [line.lstrip("│ ") for line in text.splitlines() if line.startswith(("│", " "))]
    found = [re.findall(r"(?<![\w-])--?[a-z][\w-]*", line) for line in lines if line.startswith("-")]
    return sorted({flag for line in found for flag in line})


def test_commands_and_flags_are_frozen():
    now = "".join(
        f"dmnist {command}".rstrip() + ": " + " ".join(flags_in(usage(command))) + "\n"
        for command in COMMANDS
    )
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(now)
    assert now == GOLDEN.read_text()


def test_flags_that_scripts_rely_on():
    assert set(PROMISED.split()) <= set(flags_in(usage("train")))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("command", ["", "verify", "data import"])
def test_help_fits_into_the_terminal(
    command: str, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word is broken, and no line of a box."""
    monkeypatch.setenv("COLUMNS", "1000")
    words = usage(command).split()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    shown = usage(command, stream)
    assert ("\x1b[" in shown) == (stream is Terminal)
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80
    first_box = next(i for i, line in enumerate(lines) if line.startswith((" options", " positional")))
    introduction = " ".join(lines[:first_box])
    assert words[: len(introduction.split())] == introduction.split()


def test_the_original_flags():
    script = ROOT / "multi_proc_single_gpu.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(ORIGINAL.split()) <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout))
