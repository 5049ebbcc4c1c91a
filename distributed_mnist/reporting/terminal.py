"""The terminal's sink: a live bar, lines, and at the end what it came to."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import reason, write_line
from .console import fall_silent
from .stragglers import EVEN, StragglerTracker

_ECHO = 3  # columns: `^C`, and the cursor
_LINES = 10  # of a screen, for all but the ranks


class Terminal:
    """What a person sees: a live bar on a terminal, plain lines elsewhere, one table at the end.

    Below the bar stands which rank is the slowest; with `ranks` a table of them all.
    """

    def __init__(self, console: Console, *, ranks: bool = False) -> None:
        self._console, self._all_ranks = console, ranks
        self._bar: _Bar | None = None
        self._waiting = StragglerTracker()
        self._task = TaskID(0)
        self._shown: dict[str, Any] = {}
        self._ranks: Sequence[Any] = ()
        self._epochs = 0

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is None or self._console.quiet:
            return
        try:
            handler(**fields)
        except OSError as error:  # a log on a full disk, a terminal that is gone: no reason to stop
            self._lose(error)

    def close(self) -> None:
        """See `Sink`."""
        try:
            self._stop_bar()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        fall_silent(self._console)
        self._stop_bar()
        with contextlib.suppress(OSError):
            write_line(f"nothing more is shown ({reason(error)}); the run goes on")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()

    def _on_start(
        self,
        *,
        lines: dict[str, str],
        epochs: int,
        steps: int,
        step: int,
        again: bool,
        ranks: Sequence[Any] = (),
        **_: Any,
    ) -> None:
        for name, text in {} if again else lines.items():  # already there to read, further up
            self._line(name, text)
        if again and self._all_ranks:  # where it was started the launcher has said more
            self._line(
                "note", f"a process was lost: all are started again, from step {step}", style="yellow"
            )
        self._epochs = epochs
        self._ranks = ranks
        self._waiting.begin(ranks)
        if self._console.is_terminal:
            self._stop_bar()  # of the group before this one
            columns = _columns(self._console.width - _ECHO, epochs, steps)
            self._bar = _Bar(*columns, console=self._console)
            scored = self._shown.get("test", "–")  # noqa: RUF001
            self._shown = {"epoch": f"1/{epochs}", "loss": "–", "test": scored, "speed": "–"}  # noqa: RUF001
            self._task = self._bar.add_task("", total=steps, completed=step, **self._shown)
            self._bar.start()

    def _on_notice(self, *, text: str, **_: Any) -> None:
        self._line("note", text, style="yellow")

    def _on_steps(
        self, *, step: int, epoch: float, loss: float, images_per_second: float, ranks: Any = None, **_: Any
    ) -> None:
        if ranks:
            self._waiting.add(ranks)
        if self._bar is not None:
            self._bar.below = self._below()
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
            f"epoch {round(epoch, 1):g}",
            f"train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}; "
            f"test loss {test_loss:.4f}, accuracy {test_accuracy:.2%}",
        )

    def _on_end(self, *, result: dict[str, Any], **_: Any) -> None:
        self._stop_bar()
        rows: dict[str, Text | str] = {
            "test accuracy": _accuracy(result),
            "test loss": f"{result['test_loss']:.6f}",
            "training": _effort(result),
            "weights sha256": result["weights_sha256"],
            "samples sha256": result["samples_sha256"],
            "data sha256": result["data_sha256"],
            "in": result["out"],
        }
        self._console.print()
        for name, value in rows.items():
            self._line(name, value, column=16)

    def _on_vote(self, *, result: dict[str, Any], **_: Any) -> None:
        alone = [member["test_accuracy"] for member in result["members"]]
        between = f"(from {min(alone):.2%} to {max(alone):.2%})"
        rows: dict[str, Text | str] = {
            f"vote of {len(alone)}": _accuracy(result),
            "each alone": f"{result['mean_accuracy_alone']:.2%} {between}",
            "test loss": f"{result['test_loss']:.6f}",
            "weights sha256": result["weights_sha256"],
            "in": result["out"],
        }
        self._console.print()
        for name, value in rows.items():
            self._line(name, value, column=16)

    def _below(self) -> RenderableType | None:
        line = self._waiting.line()
        if self._all_ranks and line:
            return rank_table(self._ranks, self._waiting, most=max(self._console.height - _LINES, 3))
        return Text(line, "dim", no_wrap=True) if line else None

    def _line(self, name: str, text: Text | str, style: str = "", column: int = 9) -> None:
        """A label and what it labels: on a terminal wrapped at words to the right of `column`."""
        label = Text(f"{name:<{column - 1}} ", "bold")
        body = text if isinstance(text, Text) else Text(text, style)
        if not self._console.is_terminal:  # whole lines for a file or a pipe, and nothing after their end
            whole = label + body
            whole.rstrip()
            self._console.print(whole, soft_wrap=True)
            return
        lines: list[Text] = []
        for line in body.wrap(self._console, max(self._console.width - column, 20)):
            line.rstrip()
            lines.append((Text(" " * column) if lines else label) + line)
        self._console.print(Text("\n").join(lines), soft_wrap=self._bar is None)


def _accuracy(result: dict[str, Any]) -> Text:
    right = (f"{result['test_accuracy']:.2%}", "bold green")
    return Text.assemble(right, f" of {_count(result['test_images'], 'image')}")


def _effort(result: dict[str, Any]) -> str:
    """What the training took: all of it, or what a resumed run did here."""
    steps, rate = result["steps"], result.get("images_per_second")
    here = result.get("steps_here", steps if rate else 0)
    if not here:
        return f"{_count(steps, 'step')}, finished before; nothing left to do"
    speed = f", {rate:,.0f} images/s" if rate else ""
    if here < steps:
        return f"{here:,} of {_count(steps, 'step')} here, in {result['seconds_here']:.1f} s{speed}"
    return f"{_count(steps, 'step')} in {result['train_seconds']:.2f} s{speed}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class _Bar(Progress):
    """Ends short of the line's end: a terminal echoes Ctrl-C there as `^C`, and if that went to the next
    line, the bar would not be wiped away."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self._width = console.width - _ECHO
        self.below: RenderableType | None = None
        super().__init__(*columns, console=console, expand=True, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """See rich."""
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """See rich."""
        table = super().make_tasks_table(tasks)
        table.width = self._width
        return table


def rank_table(ranks: Sequence[Mapping[str, Any]], waiting: StragglerTracker, most: int) -> Table:
    """A line a rank, the slowest first, at most so many; busy and waiting in ms a step."""
    table = Table(
        box=None, pad_edge=False, header_style="dim", caption=waiting.line(), caption_justify="left"
    )
    for name in ("rank", "host", "pid", "busy ms", "exchange ms"):
        table.add_column(name, justify="left" if name == "host" else "right")
    table.add_column("")
    longest = max(waiting.busy[i] + each for i, each in enumerate(waiting.exchange)) or 1.0
    order = sorted(range(len(waiting.exchange)), key=waiting.exchange.__getitem__)
    for rank in order[:most]:
        busy, spoken = waiting.busy[rank], waiting.exchange[rank]
        who = ranks[rank] if rank < len(ranks) else {"host": "?", "pid": "?"}
        bar = Text("█" * round(20 * busy / longest), "green") + Text(
            "░" * round(20 * spoken / longest), "yellow"
        )
        style = "bold" if rank == waiting.slowest and waiting.share >= EVEN else ""
        cells = [str(rank), str(who["host"]), str(who["pid"]), f"{1e3 * busy:.2f}", f"{1e3 * spoken:.2f}"]
        table.add_row(*cells, bar, style=style)
    if len(order) > most:
        table.add_row("…", f"and {len(order) - most} that are faster")
    return table


def _columns(width: int, epochs: int, steps: int) -> list[ProgressColumn]:
    """The live bar's parts that fit into `width`; step and time left are always among them."""
    # In the order in which they are shown, each with the most it takes.
    parts: dict[str, tuple[ProgressColumn, int]] = {
        "epoch": (TextColumn("epoch {task.fields[epoch]}"), len(f"epoch {epochs}/{epochs}")),
        "bar": (BarColumn(bar_width=None), 10),
        "step": (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), len(f"step {steps}/{steps}")),
        "loss": (TextColumn("loss {task.fields[loss]}"), len("loss 0.1234")),
        "test": (TextColumn("test {task.fields[test]}"), len("test 99.99%")),
        "speed": (TextColumn("{task.fields[speed]}"), len("123,456 images/s")),
        "left": (TimeRemainingColumn(compact=True, elapsed_when_finished=True), len("0:00:00")),
    }
    for name in ("speed", "epoch", "test", "loss", "bar"):
        if sum(size + 1 for _, size in parts.values()) - 1 <= width:
            break
        del parts[name]
    return [column for column, _ in parts.values()]
