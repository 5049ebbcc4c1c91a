"""A name that was probably meant, for messages about one that is not known."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean NAME?`, or nothing where none is like it."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str], other: str = "") -> str:
    """That there is no such thing, which one was probably meant, and which there are."""
    known = list(known)
    meant = did_you_mean(name, known) or ";"
    return f"there is no {kind} {name!r}{meant} there are {', '.join(known)}{other}"
