"""Print a command's own output: text for people, or one JSON object for scripts."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..common.printable import printable
from ..common.streams import redirect_to_null
from ..errors import OutputError, reason


class _PlainConsole(Console):
    """A console that prints text as it is, without markup: a folder may be called `[/red]`.

    Control characters are shown as escapes, because text may come from files of others.
    """

    def __init__(self, *, stderr: bool, rewrites_lines: bool) -> None:
        self.rewrites_lines = rewrites_lines
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(
            stderr=stderr,
            markup=False,
            highlight=False,
            # With FORCE_COLOR set, as in notebooks and CI, rich would draw live bars into a file too.
            force_terminal=None if stream.isatty() else False,
            force_jupyter=False,  # there it would print a HTML table for each line
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Return the segments of text to print. All that a console prints goes through here."""
        for segment in super().render(renderable, options):
            is_safe = segment.control is not None or (segment.text.isascii() and segment.text.isprintable())
            yield segment if is_safe else Segment(self._safe(segment.text), segment.style)

    def _safe(self, text: str) -> str:
        """Return the text with escapes for control characters and for what the locale cannot write."""
        return printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding)

    def on_broken_pipe(self) -> None:
        """Print nothing more when the reader is gone (`| head`). By default rich would end the process."""
        silence(self)


def in_notebook() -> bool:
    """Return whether standard output is shown in a Jupyter notebook, also in Colab and VS Code."""
    return type(sys.stdout).__module__.startswith("ipykernel.")


def make_console(*, stderr: bool = False, rewrites_lines: bool = False) -> Console:
    """Make a console for standard output, or for standard error if standard output is for a JSON object.

    With `rewrites_lines`, `\r` moves to the beginning of the line, as in a notebook, though this is no
    terminal.
    """
    console = _PlainConsole(stderr=stderr, rewrites_lines=rewrites_lines)
    if not console.file.isatty():
        console.width = 1000  # a file or a pipe gets whole lines
    return console


def silence(console: Console) -> None:
    """Print nothing more on this console, and drop what is still in its buffer."""
    console.quiet = True
    redirect_to_null(console.file)  # type: ignore[arg-type]


def print_labelled(
    console: Console, label: Text, text: Text, column: int, *, soft_wrap: bool = True
) -> None:
    """Print a label, and to its right the text, which starts at `column`.

    On a terminal the text is wrapped at words, each line at `column`. A file or a pipe gets one line.
    """
    if not console.is_terminal:
        line = label + text
        line.rstrip()
        console.print(line, soft_wrap=True)
        return
    lines: list[Text] = []
    for line in text.wrap(console, max(console.width - column, 20)):
        line.rstrip()
        lines.append((Text(" " * column) if lines else label) + line)
    console.print(Text("\n").join(lines), soft_wrap=soft_wrap)


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object as one line on standard output. Raises `OutputError` if it cannot be written."""
    try:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
    except OSError as error:
        redirect_to_null(sys.stdout)
        raise OutputError(f"standard output: {reason(error)}") from None
