"""Parse the command line with tyro into one of the classes of `flags_*`."""

import argparse
import contextlib
import dataclasses
import io
import re
import shutil
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ..config import DATA_OPTIONS, Recipe, Run
from ..errors import UsageError
from ..runs.run_files import config_in, find_recipe
from .flags_data import Check, Fetch, Generate, Import
from .flags_train import Bench, Train, Verify
from .flags_use import Doctor, Evaluate, Export, Predict, Report, Stop, Watch
from .home import expand_home
from .usage_errors import explain_usage_error, plain_types

_SUMMARY = "Distributed training of digit classifiers. dmnist --version prints its and torch's version."
_STYLE = re.compile(r"\x1b\[[\d;]*m")  # colours and the like, which take no room
_METAVARS_BY_TYPE = {int: "N", float: "X", Path: "DIR", str: "NAME"}
_METAVARS_BY_NAME = {
    "checkpoint": "CHECKPOINT",
    "checkpoint_every": "EVERY",
    "eval_every": "EVERY",
    "images": "IMAGE [IMAGE ...]",
    "init_from": "PATH",
    "mirror": "URL",
    "recipe": "NAME|FILE|RUN",
    "resume": "PATH|auto",
    "run": "RUN",
    "runs": "RUN [RUN ...]",
    "sections": "[SECTION ...]",
    "source": "SOURCE",
    "validation": "N|FRACTION",
}

COMMANDS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "report": Report,
    "watch": Watch,
    "stop": Stop,
    "export": Export,
    "verify": Verify,
    "doctor": Doctor,
    "bench": Bench,
    "data": {"fetch": Fetch, "check": Check, "import": Import, "generate": Generate},
}
"""Command classes by name. A nested dictionary is a group of commands."""
_GROUPS = {"data": "Download, check, import or generate data sets."}


def parse(arguments: list[str]) -> Any:
    """Parse a command line into an instance of one of the classes in `COMMANDS`.

    Prints help and exits for `--help`. Raises `UsageError` for invalid arguments.
    """
    # torch.distributed.launch inserts this flag before all others. The environment contains the same value.
    arguments = [argument for argument in arguments if not re.fullmatch(r"--local[-_]rank=\d+", argument)]
    arguments = expand_home(arguments)
    train = _train_defaults(arguments)
    tyro_message, help_text = io.StringIO(), _HelpText(sys.stdout)
    try:
        with (
            contextlib.redirect_stderr(tyro_message),
            contextlib.redirect_stdout(help_text),
            _help_rules(),
        ):
            return tyro.cli(_union(COMMANDS, train), prog="dmnist", args=arguments, description=_SUMMARY)
    except SystemExit as stop:
        if stop.code in (0, None):
            is_help = not {"-h", "--help"}.isdisjoint(arguments)  # not a script for a shell's completion
            sys.stdout.write(help_text.wrapped() if is_help else help_text.getvalue())
            raise
        raise UsageError(explain_usage_error(COMMANDS, arguments, tyro_message.getvalue())) from None


class _HelpText(io.StringIO):
    """Collects what tyro prints to a stream. tyro wraps lines in boxes, but not those before the boxes."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self.encoding = stream, stream.encoding

    def isatty(self) -> bool:
        """See `TextIO`."""
        return self._stream.isatty()

    def wrapped(self) -> str:
        """The text, with lines that fit into the terminal."""
        width = shutil.get_terminal_size().columns
        wrap = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        lines = self.getvalue().split("\n")
        return "\n".join(line if len(_STYLE.sub("", line)) <= width else wrap(line) for line in lines)


def _union(commands: dict[str, Any], train: Train) -> Any:
    """The union type that tyro turns into subcommands. `train` holds the defaults of `dmnist train`."""
    parts: list[Any] = []
    for name, command in commands.items():
        if isinstance(command, dict):
            group = tyro.conf.subcommand(name, description=_GROUPS[name])
            parts.append(Annotated[_union(command, train), group])
        elif command is Train:
            parts.append(Annotated[command, tyro.conf.subcommand(name, default=train)])
        else:
            parts.append(Annotated[command, tyro.conf.subcommand(name)])
    return Union[tuple(parts)]  # noqa: UP007 - `|` cannot be applied to a tuple


def _train_defaults(arguments: list[str]) -> Train:
    """The defaults of the flags of `train`.

    They come from the recipe that `--recipe` names. With `--resume auto`, the data settings come from the
    run in `--out`, and so does the recipe unless `--recipe` names one. Raises `UsageError` for a recipe
    that cannot be used, and `CheckpointError` for a damaged `config.json`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--out", "--resume", "--dataset", "--model", "--loss", "--optimizer"):
        early.add_argument(name, nargs="?")  # tyro reports a missing value
    given, _ = early.parse_known_args(arguments if arguments[:1] == ["train"] else [])
    config = config_in(Path(given.out)) if given.out and given.resume == "auto" else None
    run = Run()
    if config is not None:
        if given.dataset in (None, config.run.dataset):
            run = Run(**{name: getattr(config.run, name) for name in DATA_OPTIONS})
        if given.recipe is None:
            # Only the user may choose code to import, not a file.
            settings = config.recipe.replace(
                **{name: getattr(Recipe, name) for name in config.recipe.code()}
            )
            return Train(settings=settings, run=run, recipe=f"of {given.out}")
    recipe = given.recipe or "default"
    own = {"model": given.model, "loss": given.loss, "optimizer": given.optimizer}
    return Train(settings=find_recipe(recipe, **own), run=run, recipe=recipe)


def _help_rules() -> ConstructorRegistry:
    """Rules for tyro's help: metavars such as N and DIR, and no defaults of None, False or ''."""
    registry = ConstructorRegistry()
    nested = False

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal nested
        if nested or not dataclasses.is_dataclass(info.type):
            return None
        nested = True  # the next line then applies tyro's own rules instead of this one
        try:
            spec: Any = ConstructorRegistry.get_struct_spec(info)
        finally:
            nested = False
        if not isinstance(spec, StructConstructorSpec):
            return spec
        return dataclasses.replace(spec, fields=tuple(map(_with_metavar, spec.fields)))

    registry.struct_rule(rule)
    return registry


def _with_metavar(spec: StructFieldSpec) -> StructFieldSpec:
    """The field with its metavar, and with its help text on one line."""
    types = plain_types(spec.type)
    if any(map(dataclasses.is_dataclass, types)):
        return spec  # a group of flags
    kind = next((kind for kind in _METAVARS_BY_TYPE if kind in types), None)
    metavar = _METAVARS_BY_NAME.get(spec.name, _METAVARS_BY_TYPE[kind]) if kind else None
    annotated = (getattr(note, "metavar", None) for note in getattr(spec.type, "__metadata__", ()))
    metavar = next(filter(None, annotated), metavar)  # an annotated metavar has priority
    help_text = spec.helptext() if callable(spec.helptext) else spec.helptext
    hint = lambda default: "" if default in ("None", "False", "") else f"(default: {default})"  # noqa: E731
    type_with_metavar: Any = Annotated[spec.type, tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
    return dataclasses.replace(spec, type=type_with_metavar, helptext=" ".join((help_text or "").split()))
