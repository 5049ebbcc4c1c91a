"""The command line's flags: one class a command, one field a flag, its docstring the help.

Here those of the commands that train; `flags_use` and `flags_data` have the rest, `grammar` reads them.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..common.installed import install
from ..config import Recipe, Run, flag, require
from ..data.catalog import require_name
from ..errors import UsageError
from ..runs.layout import members_in


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """What every command has."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Train(CommonFlags):
    """Train a digit classifier; the same weights on any number of processes."""

    settings: Annotated[tyro.conf.OmitArgPrefixes[Recipe], tyro.conf.arg(name="recipe")]
    run: tyro.conf.OmitArgPrefixes[Run] = field(default_factory=Run)
    recipe: str = "default"
    """Where the settings below come from: default, classic (the original script's), fast, accurate, or your
    own TOML file. Flags override it."""
    ensemble: int = 1
    """Train so many networks one after the other, seeds counting up from --seed, and let them vote."""

    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write events for TensorBoard too, into the run's folder."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for an unknown data set, and for what cannot be done."""
        if self.tensorboard and find_spec("tensorboard") is None:
            raise UsageError(f"--tensorboard needs it: {install('tensorboard')}")
        require_name(self.run.dataset)
        require(self.ensemble >= 1, "ensemble", "at least 1", self)
        out = self.run.out
        if self.ensemble == 1 and self.run.resume == "auto" and out and (members := members_in(out)):
            raise UsageError(f"{out} is an ensemble: add --ensemble {len(members)}")
        if self.ensemble > 1 and self.run.resume not in (None, "auto"):
            raise UsageError("--ensemble goes on with --resume auto: one checkpoint is of one network")


@dataclass(frozen=True)
class Verify(CommonFlags):
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
class Bench(CommonFlags):
    """Measure this machine: start-up, data, throughput and scaling against a plain loop, exchanges, time to
    99 %. Takes some minutes; nothing else should run meanwhile."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure: startup, data, scaling, exchange, time-to-99; by default all."""
    recipe: str = "default"
    """Recipe of startup and scaling."""
    nproc: int | None = None
    """Measure at 1, 2, ... N processes; by default one per core, at most 4."""
    runs: Annotated[int, tyro.conf.arg(metavar="N")] = 3
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
