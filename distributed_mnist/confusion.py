"""A confusion matrix for people: the table, each class's accuracy, what is taken for what most often."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MOST_CLASSES = 12
"""Of a table that fits into 80 columns."""
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


def table(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> RenderableType:
    """The matrix (rows are true) with each class's accuracy; of many classes the accuracy alone."""
    whole = len(names) <= MOST_CLASSES
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("true", justify="right", style="bold")
    for name in names if whole else []:
        shown.add_column(name[:4], justify="right")
    for column in ("images", "wrong", "right"):
        shown.add_column(column, justify="right")
    many = max((count for _, _, count in worst_pairs(confusion)), default=0)
    for i, (one, row) in enumerate(zip(per_class(confusion, names), confusion, strict=True)):
        cells = [_cell(count, i == j, many) for j, count in enumerate(row)] if whole else []
        right = "–" if one["accuracy"] is None else f"{one['accuracy']:.2%}"  # noqa: RUF001
        wrong = str(one["images"] - one["correct"])
        shown.add_row(one["name"], *cells, f"{one['images']:,}", wrong, right)
    pairs = worst_pairs(confusion)[:_PAIRS]
    told = ", ".join(f"{names[i]} for {names[j]} {count}×" for i, j, count in pairs)  # noqa: RUF001
    return Group(
        shown, Text(f"\nmost often taken: {told}" if told else "\nnothing is taken for anything else")
    )


def _cell(count: int, right: bool, many: int) -> Text:
    if right:
        return Text(str(count), "bold green")
    return Text(str(count) if count else "·", "red" if count and 2 * count >= many else "dim" * (not count))
