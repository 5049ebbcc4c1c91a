"""A confusion matrix for people: the table, each class's accuracy, what is taken for what most often."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHORT = 4
"""Letters of a name that can stand over a column; longer ones are numbered."""
_PAIRS = 10


def per_class(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class `name`, `images`, `correct` and `accuracy` (0 to 1; None without images)."""
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
    """(true class, taken for, how often), the most frequent first; only what happened."""
    pairs = [
        (i, j, count)
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def table(confusion: Sequence[Sequence[int]], names: Sequence[str], width: int) -> RenderableType:
    """The matrix (rows are true) with each class's accuracy; where that is too wide the accuracy alone."""
    numbered = any(len(name) > _SHORT for name in names)
    heads = [str(i) for i in range(len(names))] if numbered else list(names)
    rows = [f"{name} {i}" for i, name in enumerate(names)] if numbered else list(names)
    columns = [
        max(len(head), *(len(str(count)) for count in column)) + 1
        for head, column in zip(heads, zip(*confusion, strict=True), strict=True)
    ]
    figures = len("images wrong 100.00% ")
    whole = max(map(len, ["true", *rows])) + sum(columns) + figures < width
    rows = rows if whole else list(names)
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("true", justify="right", style="bold")
    for head in heads if whole else []:
        shown.add_column(head, justify="right")
    for column in ("images", "wrong", "right"):
        shown.add_column(column, justify="right")
    many = max((count for _, _, count in worst_pairs(confusion)), default=0)
    for i, (one, row) in enumerate(zip(per_class(confusion, names), confusion, strict=True)):
        cells = [_cell(count, i == j, many) for j, count in enumerate(row)] if whole else []
        right = "–" if one["accuracy"] is None else f"{one['accuracy']:.2%}"  # noqa: RUF001
        wrong = str(one["images"] - one["correct"])
        shown.add_row(rows[i], *cells, f"{one['images']:,}", wrong, right)
    pairs = worst_pairs(confusion)[:_PAIRS]
    told = ", ".join(f"{names[i]} for {names[j]} {count}×" for i, j, count in pairs)  # noqa: RUF001
    return Group(
        shown, Text(f"\nmost often taken: {told}" if told else "\nnothing is taken for anything else")
    )


def _cell(count: int, right: bool, many: int) -> Text:
    if right:
        return Text(str(count), "bold green")
    return Text(str(count) if count else "·", "red" if count and 2 * count >= many else "dim" * (not count))
