"""Explain in one line what is wrong with a command line.

tyro's own messages span several lines and do not always name the flag at fault, so arguments that tyro
rejects are checked again here. This module also reads the type annotations of flags, for the help texts.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ..common.printable import shortened
from ..common.suggest import did_you_mean
from ..config import flag

_REQUIRED = {
    "evaluate": "a CHECKPOINT or a run's folder",
    "predict": "a CHECKPOINT or a run's folder, and pictures",
    "watch": "a run's folder",
    "stop": "a run's folder",
    "export": "a CHECKPOINT or a run's folder",
    "data import": "a file or folder to import",
    "data generate": "a folder to write to",
}
_TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "0", "1")
_FLAG = re.compile(r"--?[a-zA-Z]")  # does not match negative numbers


def explain_usage_error(commands: dict[str, Any], arguments: list[str], tyro_message: str) -> str:
    """Explain in one line what is wrong with `arguments`.

    `commands` maps names to command classes, or to nested dictionaries of them. `tyro_message` is tyro's
    own message, which is used if this function finds no problem.
    """
    level: Any = commands
    command = ""
    rest = list(arguments)
    while isinstance(level, dict):
        names = [f"{command} {name}".strip() for name in level]
        if not rest:
            return f"which command? {_join_choices(names)} (dmnist COMMAND --help lists the flags)"
        argument = rest.pop(0)
        if argument.startswith("-"):
            return f"{argument.partition('=')[0]} must come after a command: {_join_choices(names)}"
        command = f"{command} {argument}".strip()
        if argument not in level:
            suggestion = did_you_mean(argument, level) or ";"
            return f"there is no command {command!r}{suggestion} there are {', '.join(names)}"
        level = level[argument]
    problem = _find_problem(command, level, rest)
    if problem is None:
        without_frame = re.sub(r"[│|╭╮╰╯─]+", " ", tyro_message)
        problem = " ".join(without_frame.split())
    return f"{problem} (dmnist {command} --help lists the flags)"


def plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation consists of. A Literal counts as one type."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return {annotation}
    if get_origin(annotation) is Annotated:
        return plain_types(get_args(annotation)[0])
    return set[Any]().union(*map(plain_types, get_args(annotation)))


def without_metadata(annotation: Any) -> Any:
    """`X` for `Annotated[X, ...]`; any other annotation unchanged."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def is_positional(annotation: Any) -> bool:
    """Whether a field is a positional argument instead of a flag."""
    return tyro.conf.Positional in getattr(annotation, "__metadata__", ())


def _find_problem(command: str, command_class: type, arguments: list[str]) -> str | None:
    """The first invalid or missing argument, explained; None if nothing wrong is found."""
    flags = _flag_types(command_class)
    positionals: list[str] = []
    while arguments:
        argument = arguments.pop(0)
        if not _FLAG.match(argument):
            positionals.append(argument)
            continue
        typed_name, has_value, value = argument.partition("=")
        name = typed_name.replace("_", "-")
        if name not in flags:
            return f"{command} has no flag {typed_name}{did_you_mean(name, flags, cutoff=0.7)}"
        if flags[name] is bool:
            if has_value or (arguments and arguments[0].lower() in _TRUTH_VALUES):
                return f"{name} takes no value: give it alone, or leave it out"
            continue
        if not has_value:
            if not arguments or _FLAG.match(arguments[0]):
                return f"{name} needs a value"
            value = arguments.pop(0)
        while get_origin(flags[name]) is tuple and arguments and not _FLAG.match(arguments[0]):
            arguments.pop(0)
        if rule := _violated_rule(plain_types(flags[name]), value):
            return f"{name} must be {rule}, not {shortened(repr(value))}"
    hints = get_type_hints(command_class, include_extras=True)
    if unexpected := positionals[sum(map(is_positional, hints.values())) :]:
        return f"{command} got an unexpected argument {unexpected[0]!r}"
    return None if positionals or command not in _REQUIRED else f"{command} needs {_REQUIRED[command]}"


def _flag_types(command_class: type) -> dict[str, Any]:
    """The type of each flag of a command."""
    types: dict[str, Any] = {}
    for name, annotation in get_type_hints(command_class, include_extras=True).items():
        plain = without_metadata(annotation)
        if is_positional(annotation):
            continue
        if dataclasses.is_dataclass(plain):
            types |= _flag_types(plain)  # type: ignore[arg-type]
        else:
            types[flag(name)] = plain
    return types


def _violated_rule(types: set[Any], value: str) -> str | None:
    """What the value must be, for example "a number"; None if the value is valid for one of these types."""
    if value == "None" and type(None) in types:
        return None
    for kind in types:
        if get_origin(kind) is Literal and value not in get_args(kind):
            return _join_choices(list(get_args(kind)))
        if kind in (int, float):
            try:
                kind(value)
            except ValueError:
                return "a whole number" if kind is int else "a number"
    return None


def _join_choices(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
