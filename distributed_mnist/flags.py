"""The command line's grammar: one class a command, one field a flag, its docstring the help."""

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from .catalog import require_name
from .complaints import complaint, kinds
from .config import Recipe, Run, flag, load_recipe, require
from .errors import UsageError

_SUMMARY = "Distributed training of digit classifiers. dmnist --version tells its and torch's version."
_METAVARS = {int: "N", float: "X", Path: "DIR", str: "NAME"}
_OTHER_METAVARS = {
    "checkpoint": "CHECKPOINT",
    "checkpoint_every": "EVERY",
    "eval_every": "EVERY",
    "mirror": "URL [URL ...]",
    "recipe": "NAME|FILE.toml",
    "resume": "PATH|auto",
    "sections": "[SECTION ...]",
}


@dataclass(frozen=True, kw_only=True)
class _Every:
    """What every command has."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Train(_Every):
    """Train a digit classifier; the same weights on any number of processes."""

    settings: Annotated[tyro.conf.OmitArgPrefixes[Recipe], tyro.conf.arg(name="recipe")]
    run: tyro.conf.OmitArgPrefixes[Run] = field(default_factory=Run)
    recipe: str = "default"
    """Where the settings below come from: default, classic (the original script's), fast, accurate, or your
    own TOML file. Flags override it."""
    ensemble: int = 1
    """Train so many networks one after the other, seeds counting up from --seed, and let them vote."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for an unknown data set, and for an impossible ensemble."""
        require_name(self.run.dataset)
        require(self.ensemble >= 1, "ensemble", "at least 1", self)
        if self.ensemble > 1 and self.run.resume not in (None, "auto"):
            raise UsageError("--ensemble goes on with --resume auto: one checkpoint is of one network")


@dataclass(frozen=True)
class Evaluate(_Every):
    """Score a checkpoint on the test images: every image once, on any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, ours or the original script's, or a run's folder, whose best is taken."""
    model: str | None = None
    """For a checkpoint of your own model: the package.module:factory it was trained with."""
    dataset: str | None = None
    """Data set to score on; by default the one it was trained on."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
    nproc: int | None = None
    """Processes to start here; by default one."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        require(self.nproc is None or self.nproc >= 1, "nproc", "at least 1", self)
        if self.dataset is not None:
            require_name(self.dataset)


@dataclass(frozen=True)
class Verify(_Every):
    """The known-answer test of a machine: train a small job at several sizes, compare every digest. Under
    torchrun, srun or mpirun: each process alone, then all of them together."""

    nproc: int | None = None
    """Train at 1, 2, ... N processes; by default one per core or GPU, at most 4."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""
    chaos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Then train with faults at random moments: processes killed, stopped, terminated, sizes changed,
    checkpoints torn. The answer must be the same."""
    faults: int | None = None
    """With --chaos, how many faults; by default 8."""
    seed: int | None = None
    """With --chaos, what decides the faults; by default random, and printed."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for name in ("nproc", "faults"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", self)
        require(self.seed is None or self.seed >= 0, "seed", "zero or more", self)
        for name in ("faults", "seed"):
            if getattr(self, name) is not None and not self.chaos:
                raise UsageError(f"{flag(name)} only goes with --chaos")


SECTIONS = ("startup", "data", "scaling", "exchange", "time-to-99")
"""What `dmnist bench` measures, in this order."""


@dataclass(frozen=True)
class Bench(_Every):
    """Measure this machine: start-up, data, throughput and scaling against a plain loop, exchanges, time to
    99 %. Takes some minutes; nothing else should run meanwhile."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure: startup, data, scaling, exchange, time-to-99; by default all."""
    recipe: str = "default"
    """Recipe of startup and scaling."""
    nproc: int | None = None
    """Measure at 1, 2, ... N processes; by default one per core, at most 4."""
    runs: int = 3
    """How often each thing is measured."""
    seeds: int = 5
    """How many runs of time-to-99."""
    seconds: float = 2.0
    """About how long each run of scaling trains."""
    dataset: str = "auto"
    """Data set; auto takes mnist if it can be had, else drawn digits."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
    out: Path | None = None
    """Folder for bench.json, and bench.svg, a plot."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        if unknown := [name for name in self.sections if name not in SECTIONS]:
            raise UsageError(f"bench measures {', '.join(SECTIONS)}, and no {unknown[0]!r}")
        for name in ("runs", "seeds"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        require(self.nproc is None or self.nproc >= 1, "nproc", "at least 1", self)
        require(0 < self.seconds <= 3600, "seconds", "above zero, and an hour at most", self)
        require_name(self.dataset)


@dataclass(frozen=True)
class Fetch(_Every):
    """Download a data set, verified, into a folder."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to put it in, laid out as torchvision does."""
    mirror: tuple[str, ...] = ()
    """Addresses to download from instead of the published ones, each a folder with the files."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for a name that is no data set, or that has no files."""
        require_name(self.dataset, files=True)


@dataclass(frozen=True)
class Check(_Every):
    """Say what is in a folder of data: every file, its rows, its checksum, and whether it is sound."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to look in."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for a name that is no data set, or that has no files."""
        require_name(self.dataset, files=True)


@dataclass(frozen=True)
class Generate(_Every):
    """Draw digits and write them as four IDX files, for --dataset idx here or for any other program."""

    out: tyro.conf.Positional[Path]
    """Folder to write to."""
    train_size: int = 60_000
    """Training images to draw."""
    test_size: int = 10_000
    """Test images to draw."""
    data_seed: int = 0
    """Seed of the drawn digits: the same seed draws the same digits everywhere."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for name in ("train_size", "test_size"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)


_DATA = {"fetch": Fetch, "check": Check, "generate": Generate}
_GRAMMAR: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "verify": Verify,
    "bench": Bench,
    "data": _DATA,
}


def parse(arguments: list[str]) -> Any:
    """The command with its flags, as one of the classes above.

    Prints help and exits for `--help`; raises `UsageError` for bad flags.
    """
    # torch.distributed.launch puts this before everything else; the environment says the same.
    arguments = [word for word in arguments if not re.fullmatch(r"--local[-_]rank=\d+", word)]
    recipe = _named_recipe(arguments)
    train = Train(settings=load_recipe(recipe), recipe=recipe)
    parts = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in _DATA.items())
    data: Any = Union[parts]  # noqa: UP007 - `|` of Annotated types is not typed
    grammar: Any = Union[  # noqa: UP007
        Annotated[Train, tyro.conf.subcommand("train", default=train)],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[Verify, tyro.conf.subcommand("verify")],
        Annotated[Bench, tyro.conf.subcommand("bench")],
        Annotated[data, tyro.conf.subcommand("data", description="Fetch, check or draw data sets.")],
    ]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), _metavars():
            return tyro.cli(grammar, prog="dmnist", args=arguments, description=_SUMMARY)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(complaint(_GRAMMAR, arguments, shown.getvalue())) from None


def _named_recipe(arguments: list[str]) -> str:
    """The value of `train --recipe`, which decides the defaults of the flags beside it."""
    named = "default"
    for i, argument in enumerate(arguments if arguments[:1] == ["train"] else []):
        if argument == "--recipe" and i + 1 < len(arguments):
            named = arguments[i + 1]
        if argument.startswith("--recipe="):
            named = argument.removeprefix("--recipe=")
    return named


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
    told = spec.helptext() if callable(spec.helptext) else spec.helptext
    hint = lambda default: "" if default in ("None", "False", "") else f"(default: {default})"  # noqa: E731
    shown: Any = Annotated[spec.type, tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
    return dataclasses.replace(spec, type=shown, helptext=" ".join((told or "").split()))
