"""From words to a command: what `flags` describes, read by tyro, with help in the program's own words."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ..config import DATA_OPTIONS, Recipe, Run, load_recipe
from ..errors import UsageError
from ..runs import layout
from .flags_data import Check, Fetch, Generate
from .flags_train import Bench, Train, Verify
from .flags_use import Doctor, Evaluate, Export, Predict, Report, Watch
from .usage_errors import complaint, kinds

_SUMMARY = "Distributed training of digit classifiers. dmnist --version tells its and torch's version."
_METAVARS = {int: "N", float: "X", Path: "DIR", str: "NAME"}
_OTHER_METAVARS = {
    "checkpoint": "CHECKPOINT",
    "checkpoint_every": "EVERY",
    "eval_every": "EVERY",
    "images": "IMAGE [IMAGE ...]",
    "mirror": "URL",
    "recipe": "NAME|FILE.toml",
    "resume": "PATH|auto",
    "run": "RUN",
    "runs": "RUN [RUN ...]",
    "sections": "[SECTION ...]",
}

GRAMMAR: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "report": Report,
    "watch": Watch,
    "export": Export,
    "verify": Verify,
    "doctor": Doctor,
    "bench": Bench,
    "data": {"fetch": Fetch, "check": Check, "generate": Generate},
}
"""Commands by name; a dictionary is a group of them."""
_GROUPS = {"data": "Fetch, check or draw data sets."}


def parse(arguments: list[str]) -> Any:
    """The command with its flags, as one of the classes of `GRAMMAR`.

    Prints help and exits for `--help`; raises `UsageError` for bad flags.
    """
    # torch.distributed.launch puts this before everything else; the environment says the same.
    arguments = [word for word in arguments if not re.fullmatch(r"--local[-_]rank=\d+", word)]
    train = _train_defaults(arguments)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), _metavars():
            return tyro.cli(_union(GRAMMAR, train), prog="dmnist", args=arguments, description=_SUMMARY)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(complaint(GRAMMAR, arguments, shown.getvalue())) from None


def _union(grammar: dict[str, Any], train: Train) -> Any:
    """The type of which tyro makes a parser: one of the commands, each under its name."""
    parts: list[Any] = []
    for name, kind in grammar.items():
        if isinstance(kind, dict):
            group = tyro.conf.subcommand(name, description=_GROUPS[name])
            parts.append(Annotated[_union(kind, train), group])
        elif kind is Train:
            parts.append(Annotated[kind, tyro.conf.subcommand(name, default=train)])
        else:
            parts.append(Annotated[kind, tyro.conf.subcommand(name)])
    return Union[tuple(parts)]  # noqa: UP007 - `|` has no such form


def _train_defaults(arguments: list[str]) -> Train:
    """`train` as its flags find it: with the recipe that is named; where a run is to go on, with its data,
    and if none is named with its recipe."""
    named, out, run = _value(arguments, "--recipe"), _value(arguments, "--out"), Run()
    told = layout.config_in(Path(out)) if out and _value(arguments, "--resume") == "auto" else None
    if told is not None:
        if _value(arguments, "--dataset") in (None, told["run"].get("dataset")):
            data = {name: told["run"][name] for name in DATA_OPTIONS if name in told["run"]}
            run = Run(**{**data, "data": Path(data.get("data", "data"))})
        if named is None:
            settings = {key: value for key, value in told["recipe"].items() if not _names_code(key, value)}
            return Train(settings=Recipe.from_dict(settings, str(out)), run=run, recipe=f"of {out}")
    named = named or "default"
    return Train(settings=load_recipe(named), run=run, recipe=named)


def _names_code(key: str, value: object) -> bool:
    """A file must not choose what is imported: a model of the user's own is named by the user."""
    return key == "model" and ":" in str(value)


def _value(arguments: list[str], flag: str) -> str | None:
    """What follows a flag of `train`, if it is there."""
    found = None
    for i, argument in enumerate(arguments if arguments[:1] == ["train"] else []):
        if argument == flag and i + 1 < len(arguments):
            found = arguments[i + 1]
        if argument.startswith(f"{flag}="):
            found = argument.removeprefix(f"{flag}=")
    return found


def _metavars() -> ConstructorRegistry:
    """Rules that call a number N and a folder DIR in the help, and do not mention defaults of None."""
    registry = ConstructorRegistry()
    asking = False

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # the other rules are asked, then what they say is changed
        try:
            spec: Any = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return spec
        return dataclasses.replace(spec, fields=tuple(map(_shown, spec.fields)))

    registry.struct_rule(rule)
    return registry


def _shown(spec: StructFieldSpec) -> StructFieldSpec:
    """A flag with its metavar, and its help without the line breaks of the source."""
    found = kinds(spec.type)
    if any(map(dataclasses.is_dataclass, found)):
        return spec  # a group of flags
    kind = next((kind for kind in _METAVARS if kind in found), None)
    metavar = _OTHER_METAVARS.get(spec.name, _METAVARS[kind]) if kind else None
    stated = (getattr(note, "metavar", None) for note in getattr(spec.type, "__metadata__", ()))
    metavar = next(filter(None, stated), metavar)  # beside the flag, where its name means another thing
    told = spec.helptext() if callable(spec.helptext) else spec.helptext
    hint = lambda default: "" if default in ("None", "False", "") else f"(default: {default})"  # noqa: E731
    shown: Any = Annotated[spec.type, tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
    return dataclasses.replace(spec, type=shown, helptext=" ".join((told or "").split()))
