"""What a run tells: events go to a sink, and a sink is a file, a terminal, several, or nothing.

Events are plain fields under a name: `start`, `notice`, `steps`, `evaluation`, `checkpoint`, `end`. Only
rank 0 has a sink that does anything; the code that logs never asks.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import OutputError


def make_console(*, stderr: bool = False) -> Console:
    """Where people read: standard output, or standard error where that belongs to a JSON object."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 1000  # whoever reads a file or a pipe wants whole lines
    return console


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Sink(Protocol):
    """Takes events."""

    def log(self, event: str, **fields: Any) -> None:
        """One event with its fields; numbers, strings and lists of them."""
        ...

    def close(self) -> None:
        """No event comes after this."""
        ...


class NullSink:
    """Of a rank that says nothing."""

    def log(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Many:
    """Every event to each of several sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.log(event, **fields)

    def close(self) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """`metrics.jsonl`: one JSON object an event, with the event's name and the time it was written.

    Appended to, never rewritten: after a crash and a resume the lines of repeated steps are there twice,
    and the later one counts.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        try:
            self._file: TextIO | None = path.open("a")
        except OSError as error:
            raise OutputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        self._path, self._complain = path, complain

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`. A full disk ends the record, not the run."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            broken, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing tries to write what is left, and fails again
                broken.close()
            self._complain(f"{self._path} ends here: {(error.strerror or str(error)).lower()}")

    def close(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Terminal:
    """What a person sees: a live bar on a terminal, plain lines elsewhere, one table at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown: dict[str, Any] = {}
        self._epochs = 0

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is not None:
            handler(**fields)

    def close(self) -> None:
        """See `Sink`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_start(self, *, lines: dict[str, str], epochs: int, steps: int, step: int, **_: Any) -> None:
        for name, text in lines.items():
            self._line(name, text)
        self._epochs = epochs
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("test {task.fields[test]}"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self._console,
                expand=True,
                transient=True,
            )
            self._shown = {"epoch": f"1/{epochs}", "loss": "–", "test": "–", "speed": "–"}  # noqa: RUF001
            self._task = self._bar.add_task("", total=steps, completed=step, **self._shown)
            self._bar.start()

    def _on_notice(self, *, text: str, **_: Any) -> None:
        self._line("note", text, style="yellow")

    def _on_steps(
        self, *, step: int, epoch: float, loss: float, images_per_second: float, **_: Any
    ) -> None:
        if self._bar is not None:
            running = min(int(epoch) + 1, self._epochs)
            self._shown |= {"epoch": f"{running}/{self._epochs}", "loss": f"{loss:.4f}"}
            self._shown |= {"speed": f"{images_per_second:,.0f} images/s"}
            self._bar.update(self._task, completed=step, **self._shown)

    def _on_evaluation(
        self,
        *,
        epoch: float,
        train_loss: float,
        train_accuracy: float,
        test_loss: float,
        test_accuracy: float,
        **_: Any,
    ) -> None:
        if self._bar is not None:
            self._shown["test"] = f"{test_accuracy:.2%}"
            self._bar.update(self._task, **self._shown)
        self._line(
            f"epoch {epoch:.4g}",
            f"train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}; "
            f"test loss {test_loss:.4f}, accuracy {test_accuracy:.2%}",
        )

    def _on_end(self, *, result: dict[str, Any], **_: Any) -> None:
        self.close()
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        rate, seconds = result["images_per_second"], result["train_seconds"]
        table.add_row(
            "test accuracy",
            f"[bold green]{result['test_accuracy']:.2%}[/] of {result['test_images']:,} images",
        )
        table.add_row("test loss", f"{result['test_loss']:.6f}")
        table.add_row("training", f"{result['steps']:,} steps in {seconds:.2f} s, {rate:,.0f} images/s")
        table.add_row("weights sha256", result["weights_sha256"])
        table.add_row("samples sha256", result["samples_sha256"])
        table.add_row("data sha256", result["data_sha256"])
        table.add_row("in", result["out"])
        self._console.print(Group("", table))

    def _line(self, name: str, text: str, style: str = "") -> None:
        line = Text.assemble((f"{name:<8} ", "bold"), (text, style))
        self._console.print(line, soft_wrap=self._bar is None)


class DataProgress:
    """Shows a bar for each part of a download or of drawing digits that takes long enough to see."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "DataProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: unknown) of the part called `description`."""
        if description not in self._tasks:
            self._tasks[description] = self._bar.add_task(description, total=total)
        self._bar.update(self._tasks[description], completed=done, total=total)
