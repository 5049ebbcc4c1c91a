"""The live progress bar of `dmnist train`, on a terminal and in a notebook."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table

_ECHO_COLUMNS = 3  # for `^C` and the cursor
_NOTEBOOK_WIDTH = 90  # of the output of a cell in JupyterLab, on a laptop's screen


def make_bar(console: Console, epochs: int, steps: int) -> "Bar":
    """Make the bar for a console, on which one is shown."""
    if console.is_terminal:
        width = console.width - _ECHO_COLUMNS
        return Bar(*_columns(width, epochs, steps), console=console, width=width)
    columns = _columns(_NOTEBOOK_WIDTH, epochs, steps)
    return _NotebookBar(*columns, console=console, width=_NOTEBOOK_WIDTH)


class Bar(Progress):
    """A progress bar with more lines below it. It leaves the last columns of the screen free.

    A terminal echoes Ctrl-C there as `^C`. If that wrapped to the next line, the bar could not be erased.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, width: int) -> None:
        self._width = width
        self.below: RenderableType | None = None
        super().__init__(*columns, console=console, expand=True, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """See `rich.progress.Progress`. Adds the lines below the bar."""
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below

    def make_room(self) -> None:
        """Do nothing: rich prints lines above the bar."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """See `rich.progress.Progress`. Limits the width."""
        table = super().make_tasks_table(tasks)
        table.width = self._width
        return table


class _NotebookBar(Bar):
    """A bar in the output of a notebook's cell: a line that the next one overwrites. It has no cursor."""

    def __init__(self, *columns: ProgressColumn, console: Console, width: int) -> None:
        super().__init__(*columns, console=console, width=width)
        self._written, self._next = 0, 0.0

    def start(self) -> None:
        """Do nothing: the first update writes."""

    def update(self, *arguments: Any, **fields: Any) -> None:
        """See `rich.progress.Progress`. Writes once a second: a notebook keeps all that is written."""
        super().update(*arguments, **fields)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            options = self.console.options.update(width=self._width)
            line = self.console.render_lines(self.make_tasks_table(self.tasks), options, pad=False)[0]
            text = "".join(segment.text for segment in line).rstrip()
            self._write("\r" + text.ljust(self._written))
            self._written = len(text)

    def make_room(self) -> None:
        """Erase the line. What is printed next stands in its place."""
        self._write("\r" + " " * self._written + "\r")
        self._written, self._next = 0, 0.0

    def stop(self) -> None:
        """Erase the line."""
        self.make_room()

    def _write(self, text: str) -> None:
        if self._written or text.strip():
            self.console.file.write(text)
            self.console.file.flush()


def _columns(width: int, epochs: int, steps: int) -> list[ProgressColumn]:
    """Return the parts of the live bar that fit into `width`; step and time left are always among them."""
    # In the order on the screen, each with its largest width.
    parts: dict[str, tuple[ProgressColumn, int]] = {
        "epoch": (TextColumn("epoch {task.fields[epoch]}"), len(f"epoch {epochs}/{epochs}")),
        "bar": (BarColumn(bar_width=None), 10),
        "step": (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), len(f"step {steps}/{steps}")),
        "loss": (TextColumn("loss {task.fields[loss]}"), len("loss 0.1234")),
        "scored": (TextColumn("{task.fields[scored]}"), len("test 99.99%")),
        "speed": (TextColumn("{task.fields[speed]}"), len("123,456 images/s")),
        "left": (TimeRemainingColumn(compact=True, elapsed_when_finished=True), len("0:00:00")),
    }
    for name in ("speed", "epoch", "scored", "loss", "bar"):
        if sum(size + 1 for _, size in parts.values()) - 1 <= width:
            break
        del parts[name]
    return [column for column, _ in parts.values()]
