"""Make the sink of a run: the terminal and the run's files on rank 0, next to nothing on the others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import Recipe
from ..distributed.world import World
from ..errors import OutputError, reason
from ..runs import layout
from ..runs.checkpoint_store import NullStore, Store
from .events import Callback, JsonLines, MistakesFile, MultiSink, NoticeSink, NullSink, Sink
from .progress_bar import Terminal


def make_sink(
    world: World,
    folder: Path,
    store: Store,
    console: Console,
    make_tensorboard_sink: Callable[[Callable[[str], None]], Sink] | None = None,
    on_event: Callable[[dict[str, Any]], object] | None = None,
) -> Sink:
    """Make this rank's sink.

    On rank 0 the sink writes to the terminal, to the run's files, and to TensorBoard if
    `make_tensorboard_sink` is given; then it calls `on_event`, if given. On other ranks it prints notices
    if the rank keeps a copy of the checkpoints, and nothing otherwise.
    """
    if world.rank != 0:
        return NullSink() if isinstance(store, NullStore) else NoticeSink(str(world.peers[world.rank]))
    terminal = Terminal(console)

    def complain(text: str) -> None:
        terminal.log("notice", text=text)

    lines = JsonLines(folder / "metrics.jsonl", complain)
    sinks: list[Sink] = [lines, MistakesFile(folder / "mistakes.json", complain), terminal]
    if make_tensorboard_sink is not None:
        sinks.append(make_tensorboard_sink(complain))
    if on_event is not None:
        sinks.append(Callback(on_event, world.status))
    return MultiSink(*sinks)


def make_tensorboard(
    folder: Path, recipe: Recipe, class_names: Sequence[str], step: int, complain: Callable[[str], None]
) -> Sink:
    """Make a sink for TensorBoard. Raises `OutputError`."""
    from .tensorboard import TensorBoard  # noqa: PLC0415 - an optional dependency

    try:
        return TensorBoard(folder / layout.TENSORBOARD, recipe, class_names, step, complain)
    except OSError as error:
        raise OutputError(f"{folder}: {reason(error)}") from None
