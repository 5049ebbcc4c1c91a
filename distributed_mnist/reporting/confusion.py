"""Show a confusion matrix: the table, the accuracy of each class, and the most frequent mistakes."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_MAX_HEADING = 4
"""Letters of a class name that fit over a column; with longer names the classes are numbered."""
_MAX_PAIRS = 10


def per_class(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return `name`, `images`, `correct` and `accuracy` of each class (0 to 1; None without images)."""
    return [
        {
            "name": name,
            "images": sum(row),
            "correct": row[i],
            "accuracy": row[i] / sum(row) if sum(row) else None,
        }
        for i, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]


def worst_pairs(confusion: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, count) of all mistakes, the most frequent first."""
    pairs = [
        (i, j, count)
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def table(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> RenderableType:
    """Make a table of the matrix (rows are true classes) and each class's accuracy.

    If that does not fit into `width` columns, it has the accuracies only.
    """
    numbered = any(len(name) > _MAX_HEADING for name in names)
    headings = [str(i) for i in range(len(names))] if numbered else list(names)
    rows = [f"{name} {i}" for i, name in enumerate(names)] if numbered else list(names)
    widths = [
        max(len(heading), *(len(str(count)) for count in column)) + 1
        for heading, column in zip(headings, zip(*confusion, strict=True), strict=True)
    ]
    figures = len("images wrong 100.00% ")
    fits = max(map(len, ["true", *rows])) + sum(widths) + figures < width
    rows = rows if fits else list(names)
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("true", justify="right", style="bold")
    for heading in headings if fits else []:
        shown.add_column(heading, justify="right")
    for column in ("images", "wrong", "right"):
        shown.add_column(column, justify="right")
    most = max((count for _, _, count in worst_pairs(confusion)), default=0)
    for i, (scores, row) in enumerate(zip(per_class(confusion, names), confusion, strict=True)):
        cells = [_count_text(count, i == j, most) for j, count in enumerate(row)] if fits else []
        accuracy = "–" if scores["accuracy"] is None else f"{scores['accuracy']:.2%}"  # noqa: RUF001
        wrong = str(scores["images"] - scores["correct"])
        shown.add_row(rows[i], *cells, f"{scores['images']:,}", wrong, accuracy)
    pairs = worst_pairs(confusion)[:_MAX_PAIRS]
    mistakes = ", ".join(f"{names[i]} as {names[j]} ({count})" for i, j, count in pairs)
    return Group(shown, Text(f"\nmost frequent mistakes: {mistakes}" if mistakes else "\nno mistakes"))


def _count_text(count: int, correct: bool, most: int) -> Text:
    """Format a cell of the matrix. `most` is the count of the most frequent mistake."""
    if correct:
        return Text(str(count), "bold green")
    if count == 0:
        return Text("·", "dim")
    return Text(str(count), "red" if 2 * count >= most else "")
