"""Suggest a known name in an error message about an unknown name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean NAME?` for the most similar known name; empty if none is similar."""
    similar = difflib.get_close_matches(name, list(known), 1, cutoff=cutoff)
    return f"; did you mean {similar[0]}?" if similar else ""


def unknown(kind: str, name: str, known: Iterable[str], other: str = "") -> str:
    """Return the message that `name` does not exist, with a suggestion and the list of known names."""
    known = list(known)
    suggestion = did_you_mean(name, known) or ";"
    return f"there is no {kind} {name!r}{suggestion} there are {', '.join(known)}{other}"
