"""What is wrong with a command line, in one line: what tyro refused is looked at again here."""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ..common.suggest import did_you_mean
from ..config import flag

_NEEDED = {
    "evaluate": "a CHECKPOINT or a run's folder",
    "predict": "a CHECKPOINT or a run's folder, and pictures",
    "watch": "a run's folder",
    "export": "a CHECKPOINT or a run's folder",
    "data generate": "a folder to write to",
}
_FLAG = re.compile(r"--?[a-zA-Z]")  # and not a negative number


def complaint(grammar: dict[str, Any], arguments: list[str], box: str) -> str:
    """What is wrong with `arguments`. `grammar` is commands by name, nested; `box` is what tyro drew."""
    level: Any = grammar
    command = ""
    words = list(arguments)
    while isinstance(level, dict):
        names = [f"{command} {name}".strip() for name in level]
        if not words:
            return f"which command? {_either(names)}; --help after one tells more"
        word = words.pop(0)
        if word.startswith("-"):
            return f"{word.partition('=')[0]} comes after a command: {_either(names)}"
        command = f"{command} {word}".strip()
        if word not in level:
            return f"there is no command {command!r}; there are {', '.join(names)}"
        level = level[word]
    # Where we find nothing, what tyro drew a box around.
    problem = _problem(command, level, words) or " ".join(re.sub(r"[│|╭╮╰╯─]+", " ", box).split())
    return f"{problem} (dmnist {command} --help lists the flags)"


def kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation; a Literal is its own."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return {annotation}
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    return set[Any]().union(*map(kinds, get_args(annotation)))


def _problem(command: str, grammar: type, words: list[str]) -> str | None:
    """The first word that is not in the command's grammar, or what is missing."""
    flags = _flags(grammar)
    given: list[str] = []
    while words:
        word = words.pop(0)
        if not _FLAG.match(word):
            given.append(word)
            continue
        shown, attached, value = word.partition("=")
        name = shown.replace("_", "-")
        if name not in flags:
            return f"{command} has no flag {shown}{did_you_mean(name, flags, cutoff=0.7)}"
        if flags[name] is bool:
            continue
        if not attached:
            if not words or _FLAG.match(words[0]):
                return f"{name} needs a value"
            value = words.pop(0)
        while get_origin(flags[name]) is tuple and words and not _FLAG.match(words[0]):
            words.pop(0)
        rule = _rule(kinds(flags[name]), value)
        if rule:
            return f"{name} must be {rule}, not {value!r}"
    if surplus := given[_positionals(grammar) :]:
        return f"{command} does not know what to do with {surplus[0]!r}"
    return None if given or command not in _NEEDED else f"{command} needs {_NEEDED[command]}"


def _flags(grammar: type) -> dict[str, Any]:
    """A command's flags with their types."""
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(grammar, include_extras=True).items():
        plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if _is_positional(annotation):
            continue
        if dataclasses.is_dataclass(plain):
            found |= _flags(plain)  # type: ignore[arg-type]
        else:
            found[flag(name)] = plain
    return found


def _positionals(grammar: type) -> int:
    return sum(map(_is_positional, get_type_hints(grammar, include_extras=True).values()))


def _is_positional(annotation: Any) -> bool:
    return tyro.conf.Positional in getattr(annotation, "__metadata__", ())


def _rule(kinds: set[Any], value: str) -> str | None:
    """What a value of these types must be, if this one is not."""
    if value == "None" and type(None) in kinds:
        return None
    for kind in kinds:
        if get_origin(kind) is Literal and value not in get_args(kind):
            return _either(list(get_args(kind)))
        if kind in (int, float):
            try:
                kind(value)
            except ValueError:
                return "a whole number" if kind is int else "a number"
    return None


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]])
