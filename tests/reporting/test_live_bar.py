"""The progress bar in a notebook: one line, which is overwritten."""

import io
import re
import sys

import pytest

from distributed_mnist.reporting.console import in_notebook, make_console
from distributed_mnist.reporting.progress_bar import Terminal

EVALUATED = {"train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 2.0, "test_accuracy": 0.25}


class OutStream(io.StringIO):
    """Standard output in a notebook's kernel."""


OutStream.__module__ = "ipykernel.iostream"


def shown(text: str) -> list[str]:
    """Return the lines that a notebook shows: after `\\r`, text overwrites what is there."""
    lines = []
    for written in text.split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def test_one_line_that_the_next_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    out = OutStream()
    monkeypatch.setattr(sys, "stdout", out)
    assert in_notebook()
    terminal = Terminal(make_console(rewrites_lines=in_notebook()))
    terminal.log("start", lines={"out": "runs/x"}, epochs=2, steps=20, step=0, again=False)
    clock = iter(range(100))
    monkeypatch.setattr("distributed_mnist.reporting.live_bar.time.monotonic", lambda: next(clock) / 2)
    for step in range(1, 10):
        terminal.log("steps", step=step, epoch=step / 10, loss=1 / step, images_per_second=2000.0)
    assert 3 <= out.getvalue().count("\r") < 9  # about once a second
    assert re.fullmatch(
        r"epoch 1/2 ━+╸? +step [89]/20 loss 0\.1\d+ test – 2,000 images/s \S+",  # noqa: RUF001
        shown(out.getvalue())[-1],
    )
    terminal.log("evaluation", epoch=1.0, **EVALUATED)
    terminal.log("steps", step=11, epoch=1.1, loss=0.5, images_per_second=9.0)
    assert shown(out.getvalue())[-1].startswith("epoch 2/2 ━")
    terminal.close()
    assert shown(out.getvalue()) == [
        "out      runs/x",
        "epoch 1  train loss 1.0000, accuracy 50.00%; test loss 2.0000, accuracy 25.00%",
        "",
    ]
    assert "\x1b" not in out.getvalue()


def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert not in_notebook()
    terminal = Terminal(make_console(rewrites_lines=in_notebook()))
    terminal.log("start", lines={}, epochs=2, steps=20, step=0, again=False)
    terminal.log("steps", step=1, epoch=0.1, loss=1.0, images_per_second=9.0)
    assert not out.getvalue()
