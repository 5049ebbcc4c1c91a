"""Check the fields of settings, with error messages that name the flags."""

import dataclasses
from pathlib import Path
from typing import Any

from ..common.printable import shortened
from ..errors import UsageError

_MOST = {"nproc": 1024, "shards": 1024, "ensemble": 1024, "train_size": 5_000_000, "test_size": 5_000_000}


def require(condition: bool, name: str, rule: str, owner: object) -> None:
    """Raise `UsageError` unless `condition`; the message says that the flag of `name` must be `rule`."""
    if not condition:
        raise UsageError(f"{flag(name)} must be {rule}, not {getattr(owner, name)}")


def require_count(owner: object, *names: str) -> None:
    """Raise `UsageError` if one of these fields is less than 1 or too large. None is allowed."""
    for name in names:
        value, most = getattr(owner, name), _MOST.get(name, 10**9)
        require(value is None or value >= 1, name, "at least 1", owner)
        require(value is None or value <= most, name, f"at most {most}", owner)


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "None",
}


def _fits(value: object, kind: Any) -> bool:
    """Return whether a value has a field's type. Callers from Python may pass anything."""
    if choices := getattr(kind, "__args__", ()):  # a union, or a Literal
        return any(
            _fits(value, choice) if isinstance(choice, type) else value == choice for choice in choices
        )
    is_kind = isinstance(value, (int, float) if kind is float else kind)
    return is_kind and isinstance(value, bool) == (kind is bool)


def check_type(name: str, field: dataclasses.Field[Any], value: object) -> None:
    """Raise `UsageError` if a value does not have the field's type. `name` names it in the message."""
    if not _fits(value, field.type):
        types = getattr(field.type, "__args__", (field.type,))
        allowed = " or ".join(_TYPE_NAMES.get(kind, str(kind)) for kind in types)
        raise UsageError(f"{name} must be {allowed}, not {shortened(repr(value))}")


def flag(name: str) -> str:
    """Return a field's command-line flag."""
    return "--" + name.replace("_", "-")
