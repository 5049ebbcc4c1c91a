"""Read JSON that may be damaged, and check it against a type.

A type is a `TypedDict`, a plain type, or a combination of these with `list`, `dict`, `|`, and `Annotated`
with a `Rule`. This module does not import torch, because the command line uses it before torch is imported.
"""

import functools
import json
import reprlib
import stat
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ..errors import CheckpointError, reason

_MAX_BYTES = 64 << 20
_LARGEST = 1e100  # a larger number is damage, and sums and products of smaller ones stay finite
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    dict: "an object",
}

Check = Callable[[Any], None]
"""Raises `ValueError` for a value that does not have the type. The message continues "its NAME: ..."."""


@dataclass(frozen=True)
class Rule:
    """A condition on a value, in addition to its type."""

    text: str
    """Such as "be positive"."""
    holds: Callable[[Any], object]


def read(path: Path, kind: Any, advice: str) -> Any:
    """Return the content of the JSON file at `path`; None if there is no file.

    Raises `CheckpointError`, which ends with `advice`, if it cannot be read or does not have this type.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file: {advice}")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}): {advice}") from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        return parse(data, kind)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {advice}") from None


def parse(data: bytes, kind: Any) -> Any:
    """Return the JSON value in `data`. Raises `ValueError` if it does not have the type `kind`."""
    try:
        value = _DECODER.decode(data.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    check_of(kind)(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


@functools.cache
def check_of(kind: Any) -> Check:
    """Return the function that checks values of the type `kind`."""
    if is_typeddict(kind):
        return _check_fields(kind)
    return _CHECKS.get(get_origin(kind), _check_plain)(kind)


def _check_plain(kind: Any) -> Check:
    if kind is float:
        # NaN is not between any two numbers.
        return _check(lambda value: type(value) in (float, int) and -_LARGEST < value < _LARGEST, kind)
    return _check(lambda value: type(value) is kind, kind)


def _check_union(kind: Any) -> Check:
    checks = [check_of(argument) for argument in get_args(kind)]

    def holds(value: Any) -> bool:
        for check in checks:
            try:
                check(value)
            except ValueError:
                continue
            return True
        return False

    return _check(holds, kind)


def _check(holds: Callable[[Any], bool], kind: Any) -> Check:
    def check(value: Any) -> None:
        if not holds(value):
            raise ValueError(f"it must be {_name(kind)}, not {reprlib.repr(value)}")

    return check


def _check_rules(kind: Any) -> Check:
    inner, rules = check_of(get_args(kind)[0]), kind.__metadata__

    def check(value: Any) -> None:
        inner(value)
        for rule in rules:
            if not rule.holds(value):
                raise ValueError(f"it must {rule.text}, not {reprlib.repr(value)}")

    return check


def _check_items(kind: Any) -> Check:
    container, inner = get_origin(kind), check_of(get_args(kind)[-1])
    items: Callable[[Any], Any] = dict.items if container is dict else enumerate
    is_floats = kind == list[float]

    def check(value: Any) -> None:
        if type(value) is not container:
            raise ValueError(f"it must be {_name(container)}, not {reprlib.repr(value)}")
        if is_floats and {*map(type, value)} == {float} and -_LARGEST < min(value) <= max(value) < _LARGEST:
            return  # the losses are most of `metrics.jsonl`
        name = None
        try:  # one `try` for all items: there may be millions
            for name, item in items(value):  # noqa: B007 - the error names the last one
                inner(item)
        except ValueError as error:
            raise ValueError(f"{_shown(name)}: {error}") from None

    return check


def _check_fields(kind: Any) -> Check:
    checks = {name: check_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    required = kind.__required_keys__

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise ValueError(f"it must be an object, not {reprlib.repr(value)}")
        if missing := sorted(required - value.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
        name = ""
        try:
            for name, inner in checks.items():
                if name in value:
                    inner(value[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    return check


_CHECKS: dict[Any, Callable[[Any], Check]] = {
    NotRequired: lambda kind: check_of(get_args(kind)[0]),
    Annotated: _check_rules,
    list: _check_items,
    dict: _check_items,
    Union: _check_union,
    types.UnionType: _check_union,
}


def _shown(key: object) -> str:
    return key if isinstance(key, str) and key.isidentifier() else f"item {reprlib.repr(key)}"


def _name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _name(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_name, get_args(kind)))
    return _NAMES.get(kind, str(kind))
