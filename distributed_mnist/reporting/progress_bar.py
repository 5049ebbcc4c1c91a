"""Show a run on the terminal: a live progress bar, lines for events, and the results at the end."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from ..errors import reason, write_line
from ..runs.record import images_of
from .console import print_labelled, silence
from .live_bar import Bar, make_bar
from .stragglers import EVEN_SHARE, StragglerTracker, uneven

_OTHER_LINES = 10  # lines of the screen that the table of ranks leaves free


class Terminal:
    """A sink that prints: a live bar on a terminal, plain lines elsewhere, and the results at the end.

    Below the bar it shows the slowest rank, or with `ranks=True` a table of all ranks.
    """

    def __init__(self, console: Console, *, ranks: bool = False) -> None:
        self._console, self._all_ranks = console, ranks
        self._bar: Bar | None = None
        self._stragglers = StragglerTracker()
        self._task = TaskID(0)
        self._bar_fields: dict[str, Any] = {}
        self._ranks: Sequence[Any] = ()
        self._epochs = 0

    def log(self, event: str, **fields: Any) -> None:
        """See `Sink`."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is None or self._console.quiet:
            return
        try:
            handler(**fields)
        except OSError as error:  # a full disk or a closed terminal must not end the run
            self._go_silent(error)

    def close(self) -> None:
        """See `Sink`."""
        try:
            self._stop_bar()
        except OSError as error:
            self._go_silent(error)

    def _go_silent(self, error: OSError) -> None:
        silence(self._console)
        self._stop_bar()
        with contextlib.suppress(OSError):
            write_line(f"no further output is shown ({reason(error)}); the run continues")

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
        for name, text in {} if again else lines.items():  # after a restart they are already on the screen
            self._line(name, text)
        if again and self._all_ranks:  # only `watch`: on the terminal of the run the launcher says more
            self._line(
                "note", f"a process was lost: all processes restart from step {step}", style="yellow"
            )
        self._epochs = epochs
        self._ranks = ranks
        self._stragglers.start_group(ranks)
        if self._console.is_terminal or getattr(self._console, "rewrites_lines", False):
            self._stop_bar()  # the bar of the group before the restart
            self._bar = make_bar(self._console, epochs, steps)
            scored = self._bar_fields.get("scored", "test –")  # noqa: RUF001
            self._bar_fields = {"epoch": f"1/{epochs}", "loss": "–", "scored": scored, "speed": "–"}  # noqa: RUF001
            self._task = self._bar.add_task("", total=steps, completed=step, **self._bar_fields)
            self._bar.start()

    def _on_notice(self, *, text: str, **_: Any) -> None:
        self._line("note", text, style="yellow")

    def _on_steps(
        self, *, step: int, epoch: float, loss: float, images_per_second: float, ranks: Any = None, **_: Any
    ) -> None:
        if ranks:
            self._stragglers.add(ranks)
        if self._bar is not None:
            self._bar.below = self._slowest()
            current = min(int(epoch) + 1, self._epochs)
            self._bar_fields |= {"epoch": f"{current}/{self._epochs}", "loss": f"{loss:.4f}"}
            self._bar_fields |= {"speed": f"{images_per_second:,.0f} images/s"}
            self._bar.update(self._task, completed=step, **self._bar_fields)

    def _on_evaluation(
        self,
        *,
        epoch: float,
        train_loss: float,
        train_accuracy: float,
        **scores: Any,
    ) -> None:
        images = images_of(scores)
        loss, accuracy = scores[f"{images}_loss"], scores[f"{images}_accuracy"]
        if self._bar is not None:
            short = {"test": "test", "validation": "val."}[images]
            self._bar_fields["scored"] = f"{short} {accuracy:.2%}"
            self._bar.update(self._task, **self._bar_fields)
        self._line(
            f"epoch {round(epoch, 1):g}",
            f"train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}; "
            f"{images} loss {loss:.4f}, accuracy {accuracy:.2%}",
        )

    def _on_end(self, *, result: dict[str, Any], **_: Any) -> None:
        self._stop_bar()
        rows: dict[str, Text | str] = {}
        if "best_step" in result:
            images = _count(result["validation_images"], "validation image")
            accuracy = f"{result['validation_accuracy']:.2%} of {images}"
            rows["best"] = f"the weights after step {result['best_step']}: {accuracy}"
        rows |= {
            "test accuracy": _accuracy(result),
            "test loss": f"{result['test_loss']:.6f}",
            "training": _duration(result),
            "weights sha256": result["weights_sha256"],
            "samples sha256": result["samples_sha256"],
            "data sha256": result["data_sha256"],
            "in": result["out"],
        }
        self._results(rows)

    def _on_vote(self, *, result: dict[str, Any], **_: Any) -> None:
        accuracies = [member["test_accuracy"] for member in result["members"]]
        accuracy_range = f"(from {min(accuracies):.2%} to {max(accuracies):.2%})"
        rows: dict[str, Text | str] = {
            f"vote of {len(accuracies)}": _accuracy(result),
            "each alone": f"{result['mean_accuracy_alone']:.2%} {accuracy_range}",
            "test loss": f"{result['test_loss']:.6f}",
            "weights sha256": result["weights_sha256"],
            "in": result["out"],
        }
        self._results(rows)

    def _slowest(self) -> RenderableType | None:
        """Return what to show below the bar."""
        summary = self._stragglers.summary()
        if self._all_ranks and summary:
            most = max(self._console.height - _OTHER_LINES, 3)
            return rank_table(self._ranks, self._stragglers, most)
        return Text(summary, "dim", no_wrap=True, overflow="ellipsis") if summary else None

    def _results(self, rows: dict[str, Text | str]) -> None:
        self._console.print()
        for name, value in rows.items():
            self._line(name, value, column=16)

    def _line(self, name: str, text: Text | str, style: str = "", column: int = 9) -> None:
        """Print a line of a run: its name, and the text at `column`."""
        if self._bar is not None:
            self._bar.make_room()
        label = Text(f"{name:<{column - 1}} ", "bold")
        body = text if isinstance(text, Text) else Text(text, style)
        print_labelled(self._console, label, body, column, soft_wrap=self._bar is None)


def _accuracy(result: dict[str, Any]) -> Text:
    accuracy = (f"{result['test_accuracy']:.2%}", "bold green")
    return Text.assemble(accuracy, f" of {_count(result['test_images'], 'image')}")


def _duration(result: dict[str, Any]) -> str:
    """Describe steps, seconds and speed of the whole run or, if it was resumed, of the steps done here."""
    steps, rate = result["steps"], result.get("images_per_second")
    here = result.get("steps_here", steps if rate else 0)
    if not here:
        return f"{_count(steps, 'step')}, finished before; nothing left to do"
    speed = f", {rate:,.0f} images/s" if rate else ""
    if here < steps:
        return f"{here:,} of {_count(steps, 'step')} here, in {result['seconds_here']:.1f} s{speed}"
    return f"{_count(steps, 'step')} in {result['train_seconds']:.2f} s{speed}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rank_table(ranks: Sequence[Mapping[str, Any]], stragglers: StragglerTracker, most: int) -> Table:
    """Make a table of the `most` slowest ranks, slowest first, with their times in ms per step."""
    table = Table(
        box=None, pad_edge=False, header_style="dim", caption=stragglers.straggler(), caption_justify="left"
    )
    parts = ("of batch",) if uneven(stragglers.share) else ()
    for name in ("rank", "host", "pid", *parts, "busy ms", "exchange ms"):
        table.add_column(name, justify="left" if name == "host" else "right")
    table.add_column("")
    longest = max(map(sum, zip(stragglers.busy, stragglers.exchange, strict=True))) or 1.0
    order = sorted(range(len(stragglers.exchange)), key=stragglers.exchange.__getitem__)
    for rank in order[:most]:
        busy, exchange = stragglers.busy[rank], stragglers.exchange[rank]
        peer = ranks[rank] if rank < len(ranks) else {"host": "?", "pid": "?"}
        bar = Text("█" * _cells(busy / longest), "green") + Text("░" * _cells(exchange / longest), "yellow")
        style = "bold" if rank == stragglers.slowest_rank and stragglers.waiting_share >= EVEN_SHARE else ""
        cells = [
            str(rank),
            str(peer["host"]),
            str(peer["pid"]),
            *(f"{stragglers.share[rank]:.1%}" for _ in parts),
            f"{1e3 * busy:.2f}",
            f"{1e3 * exchange:.2f}",
        ]
        table.add_row(*cells, bar, style=style)
    if len(order) > most:
        table.add_row("…", f"and {len(order) - most} faster ranks")
    return table


def _cells(share: float) -> int:
    """Return the length of a bar for a share of the longest one, which may be wrong in a damaged file."""
    return round(20 * min(max(share, 0.0), 1.0))
