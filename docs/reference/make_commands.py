"""Write `docs/reference/commands.md` from the code: every command, flag and built-in recipe.

    python docs/reference/make_commands.py

It reads `parser.COMMANDS` and the classes there, so a new command or flag needs no change here. A test
checks that the file is up to date.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from distributed_mnist.cli.flags_train import CommonFlags
from distributed_mnist.cli.parser import COMMANDS
from distributed_mnist.cli.usage_errors import is_positional, plain_types, without_metadata
from distributed_mnist.config import Recipe, Run, flag, load_recipe, recipe_names

PAGE = Path(__file__).with_name("commands.md")
HEAD = """\
# Reference

All commands, flags and recipe fields. `docs/reference/make_commands.py` generates this page from the code.
Do not edit it.

`dmnist COMMAND --help` shows the same information in a terminal. See [exit-codes.md](exit-codes.md) for the
exit codes and [run-folder.md](run-folder.md) for the files that a run writes.
"""
EVERYWHERE = "Every command has these flags:"
TAKES = {int: "integer", float: "number", str: "text", Path: "path", bool: ""}
PARTS = {
    Recipe: "The recipe: settings that determine the weights",
    Run: "The run: settings that do not affect the weights",
}


RECIPE_NOTE = """\
Each flag is also a field of a recipe's TOML file, with `_` instead of `-`. The defaults below are those of
the recipe `default`.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page as Markdown."""
    commands = list(_commands(COMMANDS, "dmnist"))
    contents = [f"- [`{name}`](#{_anchor(name)}): {_summary(kind)}" for name, kind in commands]
    contents.append("- [Built-in recipes](#recipes)")
    parts = [HEAD, "\n".join(contents) + "\n", f"{EVERYWHERE}\n\n{_table(CommonFlags)}"]
    parts += [_section(name, kind) for name, kind in commands]
    parts.append(_recipes())
    return "\n".join(parts)


def _commands(commands: dict[str, Any], prefix: str) -> Iterator[tuple[str, type]]:
    """The full name and the class of each command, including those in groups."""
    for name, kind in commands.items():
        if isinstance(kind, dict):
            yield from _commands(kind, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", kind


def _section(name: str, kind: type) -> str:
    """The section of one command: summary, usage and flags."""
    words = [_positional(field) for field in _fields(kind) if _is_positional(kind, field)]
    usage = " ".join([name, *words, "[flags]"])
    parts = [f"## {name}\n", f"{_summary(kind)}\n", f"```text\n{usage}\n```\n"]
    nested = [field for field in _fields(kind) if dataclasses.is_dataclass(_plain(kind, field))]
    own = [f for f in _fields(kind) if f not in nested and f.name not in _names(CommonFlags)]
    if own:
        parts.append(_table(kind, own))
    for field in nested:
        inner = _plain(kind, field)
        parts.append(f"### {PARTS.get(inner, field.name)}\n")
        if inner is Recipe:
            parts.append(RECIPE_NOTE)
        parts.append(_table(inner))
    return "\n".join(parts)


def _table(kind: type, fields: list[dataclasses.Field[Any]] | None = None) -> str:
    """A table of the flags of a class, one per row."""
    help_texts = _help_texts(kind)
    rows = ["| flag | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields or _fields(kind):
        name = _positional(field) if _is_positional(kind, field) else flag(field.name)
        cells = [f"`{name}`", _takes(kind, field), _default(kind, field), help_texts[field.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _recipes() -> str:
    """A table of the fields in which the built-in recipes differ, and a list of the other fields."""
    recipes = {name: load_recipe(name) for name in recipe_names()}
    rows = [
        f"| field | {' | '.join(f'`{name}`' for name in recipes)} |",
        "| --- " * (len(recipes) + 1) + "|",
    ]
    for field in dataclasses.fields(Recipe):
        values = [getattr(recipe, field.name) for recipe in recipes.values()]
        if len(set(values)) > 1:
            cells = [str(value) if value != field.default else f"*{value}*" for value in values]
            rows.append(f"| `{field.name}` | {' | '.join(cells)} |")
    same = [field for field in dataclasses.fields(Recipe) if _shared(list(recipes.values()), field.name)]
    listed = ", ".join(f"`{field.name} = {_toml(field.default)}`" for field in same)
    return (
        "## Recipes\n\n"
        "The built-in recipes, for `--recipe NAME`. A value in *italics* is the field's default, which "
        "also applies to your own TOML file if it does not set the field.\n\n"
        + "\n".join(rows)
        + f"\n\nIn all of them: {listed}.\n"
    )


def _shared(recipes: list[Recipe], name: str) -> bool:
    return len({getattr(recipe, name) for recipe in recipes}) == 1


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields in the order to show them: positional arguments first."""
    fields: list[dataclasses.Field[Any]] = list(dataclasses.fields(kind))
    return sorted(fields, key=lambda field: not _is_positional(kind, field))


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _annotation(kind: type, field: dataclasses.Field[Any]) -> Any:
    return get_type_hints(kind, include_extras=True)[field.name]


def _plain(kind: type, field: dataclasses.Field[Any]) -> Any:
    """The field's type without the metadata for tyro."""
    return without_metadata(_annotation(kind, field))


def _is_positional(kind: type, field: dataclasses.Field[Any]) -> bool:
    return is_positional(_annotation(kind, field))


def _positional(field: dataclasses.Field[Any]) -> str:
    return field.name.upper() if field.default is dataclasses.MISSING else f"[{field.name.upper()}]"


def _takes(kind: type, field: dataclasses.Field[Any]) -> str:
    """What a flag takes: a type of value, or one of several words."""
    found = plain_types(_annotation(kind, field)) - {type(None), ...}
    choices = [str(word) for type_ in found if get_origin(type_) is Literal for word in get_args(type_)]
    plain = sorted(
        str(TAKES.get(type_, type_.__name__)) for type_ in found if get_origin(type_) is not Literal
    )
    words = " or ".join([", ".join(f"`{word}`" for word in choices)] * bool(choices) + plain)
    return f"{words}, any number" if get_origin(_plain(kind, field)) is tuple else words


def _default(kind: type, field: dataclasses.Field[Any]) -> str:
    value = getattr(load_recipe("default"), field.name) if kind is Recipe else field.default
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None or value is False or value == () else f"`{value}`"


def _help_texts(kind: type) -> dict[str, str]:
    """The docstring of each field of a class and of its base classes, on one line."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        for parameter in docstring_parser.parse_from_object(parent).params:
            found[parameter.arg_name] = " ".join((parameter.description or "").split())
    return found


def _summary(kind: type) -> str:
    """The class's docstring, on one line."""
    return " ".join((kind.__doc__ or "").split())


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    main()
