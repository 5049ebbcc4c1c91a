"""The command line's grammar: one class a command, one field a flag, its docstring the help."""

import contextlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from .config import Recipe, Run, load_recipe, require
from .errors import UsageError

_SUMMARY = "Distributed training of digit classifiers: the same weights on any number of processes."


@dataclass(frozen=True)
class Train:
    """Train a digit classifier; the same weights on any number of processes."""

    settings: tyro.conf.OmitArgPrefixes[Recipe]
    run: tyro.conf.OmitArgPrefixes[Run] = field(default_factory=Run)
    recipe: str = "default"
    """What the settings start from: a name (classic, default) or a TOML file. Flags override it."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on the test images: every image once, on any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of ours or of the original script."""
    dataset: str | None = None
    """Data set to score on; by default the one it was trained on."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
    nproc: int | None = None
    """Processes to start here."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator if there is one. cpu: never."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        require(self.nproc is None or self.nproc >= 1, "nproc", "at least 1", self)


@dataclass(frozen=True)
class Fetch:
    """Download a data set, verified, into a folder."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to put it in (torchvision's layout inside)."""
    mirror: tuple[str, ...] = ()
    """Base addresses to ask instead of the published ones."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Check:
    """Say what is in a folder of data: every file, its rows, its checksum, and whether it is sound."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to look in."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Generate:
    """Draw digits and write them as four IDX files, for --dataset idx here or for any other program."""

    out: tyro.conf.Positional[Path]
    """Folder to write to."""
    train_size: int = 60_000
    """Training images."""
    test_size: int = 10_000
    """Test images."""
    data_seed: int = 0
    """Key of the drawn digits."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)


def parse(arguments: list[str]) -> Any:
    """The command with its flags, as one of the classes above.

    Prints help and exits for `--help`; raises `UsageError` for bad flags.
    """
    # torch.distributed.launch puts this before everything else; the environment says the same.
    arguments = [word for word in arguments if not re.fullmatch(r"--local[-_]rank=\d+", word)]
    recipe = _named_recipe(arguments)
    train = Train(settings=load_recipe(recipe), recipe=recipe)
    data = Union[  # noqa: UP007 - `|` of Annotated types is not typed
        Annotated[Fetch, tyro.conf.subcommand("fetch")],
        Annotated[Check, tyro.conf.subcommand("check")],
        Annotated[Generate, tyro.conf.subcommand("generate")],
    ]
    grammar: Any = Union[  # noqa: UP007
        Annotated[Train, tyro.conf.subcommand("train", default=train)],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[data, tyro.conf.subcommand("data", description="Fetch, check or draw data sets.")],
    ]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(grammar, prog="dmnist", args=arguments, description=_SUMMARY)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_in_one_line(shown.getvalue())) from None


def _named_recipe(arguments: list[str]) -> str:
    """The value of `--recipe`, which decides the defaults of the flags beside it."""
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--recipe="):
            return argument.removeprefix("--recipe=")
    return "default"


def _in_one_line(box: str) -> str:
    """The first message in a box that tyro draws around its errors."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        if not line or set(line) <= set("─╰╯-"):
            break
        message.append(line)
    return (" ".join(message) or "bad command line") + " (--help lists the flags)"
