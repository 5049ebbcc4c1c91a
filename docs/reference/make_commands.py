"""Writes `docs/reference/commands.md` from the code: every command, every flag, every built-in recipe.

    python docs/reference/make_commands.py

Walks `grammar.GRAMMAR` and the data classes there, so a new command or flag needs nothing here. A test
compares the file with what this would write.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from distributed_mnist.cli.flags_train import CommonFlags
from distributed_mnist.cli.parser import GRAMMAR
from distributed_mnist.cli.usage_errors import kinds
from distributed_mnist.config import Recipe, Run, flag, load_recipe, recipe_names

PAGE = Path(__file__).with_name("commands.md")
HEAD = """\
# Reference

Every command, every flag, every field of a recipe. This page is written from the code by
`docs/reference/make_commands.py`; do not edit it.

`dmnist COMMAND --help` says the same in a terminal. What a command can end with stands in
[exit-codes.md](exit-codes.md), what a run leaves behind in [run-folder.md](run-folder.md).
"""
EVERYWHERE = "Every command has these:"
TAKES = {int: "integer", float: "number", str: "text", Path: "path", bool: ""}
PARTS = {
    Recipe: "What decides the weights: the recipe",
    Run: "How it is carried out: the weights stay the same",
}


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page as Markdown."""
    commands = list(_commands(GRAMMAR, "dmnist"))
    contents = [f"- [`{name}`](#{_anchor(name)}): {_summary(kind)}" for name, kind in commands]
    contents.append("- [The recipes that come with it](#recipes)")
    parts = [HEAD, "\n".join(contents) + "\n", f"{EVERYWHERE}\n\n{_table(CommonFlags)}"]
    parts += [_section(name, kind) for name, kind in commands]
    parts.append(_recipes())
    return "\n".join(parts)


def _commands(grammar: dict[str, Any], before: str) -> Iterator[tuple[str, type]]:
    """The full name and the class of each command; groups are walked into."""
    for name, kind in grammar.items():
        if isinstance(kind, dict):
            yield from _commands(kind, f"{before} {name}")
        else:
            yield f"{before} {name}", kind


def _section(name: str, kind: type) -> str:
    """A command: what it does, how it is called, its flags."""
    words = [_positional(field) for field in _fields(kind) if _is_positional(kind, field)]
    usage = " ".join([name, *words, "[flags]"])
    parts = [f"## {name}\n", f"{_summary(kind)}\n", f"```text\n{usage}\n```\n"]
    nested = [field for field in _fields(kind) if dataclasses.is_dataclass(_plain(kind, field))]
    own = [f for f in _fields(kind) if f not in nested and f.name not in _names(CommonFlags)]
    if own:
        parts.append(_table(kind, own))
    for field in nested:
        inner = _plain(kind, field)
        told = "Each is also a field of a recipe's TOML file, with `_` for `-`. " if inner is Recipe else ""
        recipe = "Defaults are those of the recipe `default`.\n" if inner is Recipe else ""
        parts.append(f"### {PARTS.get(inner, field.name)}\n")
        if told:
            parts.append(f"{told}{recipe}")
        parts.append(_table(inner))
    return "\n".join(parts)


def _table(kind: type, fields: list[dataclasses.Field[Any]] | None = None) -> str:
    """The flags of a class, one a row."""
    told = _told(kind)
    rows = ["| flag | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields or _fields(kind):
        name = _positional(field) if _is_positional(kind, field) else flag(field.name)
        cells = [f"`{name}`", _takes(kind, field), _default(kind, field), told[field.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _recipes() -> str:
    """The built-in recipes side by side: fields in which they differ."""
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
        "What comes with the program, by `--recipe NAME`. *Italics* is what a file of your own has "
        "if it does not say.\n\n" + "\n".join(rows) + f"\n\nIn all of them: {listed}.\n"
    )


def _shared(recipes: list[Recipe], name: str) -> bool:
    return len({getattr(recipe, name) for recipe in recipes}) == 1


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    """In the order to be shown: what comes without a flag first."""
    fields: list[dataclasses.Field[Any]] = list(dataclasses.fields(kind))
    return sorted(fields, key=lambda field: not _is_positional(kind, field))


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _annotation(kind: type, field: dataclasses.Field[Any]) -> Any:
    return get_type_hints(kind, include_extras=True)[field.name]


def _plain(kind: type, field: dataclasses.Field[Any]) -> Any:
    """The field's type without what tyro is told about it."""
    annotation = _annotation(kind, field)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_positional(kind: type, field: dataclasses.Field[Any]) -> bool:
    return tyro.conf.Positional in getattr(_annotation(kind, field), "__metadata__", ())


def _positional(field: dataclasses.Field[Any]) -> str:
    return field.name.upper() if field.default is dataclasses.MISSING else f"[{field.name.upper()}]"


def _takes(kind: type, field: dataclasses.Field[Any]) -> str:
    """What is to be given: one of several words, or a kind of value."""
    found = kinds(_annotation(kind, field)) - {type(None), ...}
    choices = [str(word) for one in found if get_origin(one) is Literal for word in get_args(one)]
    plain = sorted(str(TAKES.get(one, one.__name__)) for one in found if get_origin(one) is not Literal)
    words = " or ".join([", ".join(f"`{word}`" for word in choices)] * bool(choices) + plain)
    return f"{words}, any number" if get_origin(_plain(kind, field)) is tuple else words


def _default(kind: type, field: dataclasses.Field[Any]) -> str:
    value = getattr(load_recipe("default"), field.name) if kind is Recipe else field.default
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None or value is False or value == () else f"`{value}`"


def _told(kind: type) -> dict[str, str]:
    """The docstring of each field, of this class and of those it comes from, on one line."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        for parameter in docstring_parser.parse_from_object(parent).params:
            found[parameter.arg_name] = " ".join((parameter.description or "").split())
    return found


def _summary(kind: type) -> str:
    """The class's docstring on one line."""
    return " ".join((kind.__doc__ or "").split())


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    main()
