"""Flags of the commands that train. Each command is a class, each flag a field, each help text a docstring.

`flags_use` and `flags_data` define the other commands. `parser` parses a command line into one of these.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..common.installed import install
from ..config import Device, Recipe, Run, flag, require, require_count
from ..data.catalog import require_name
from ..errors import UsageError
from ..runs.layout import members_in
from ..verify.injection import Injection


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of every command."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print exactly one JSON object to standard output, and nothing else."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the full traceback on errors."""


@dataclass(frozen=True)
class Train(CommonFlags):
    """Train a digit classifier. The weights are the same for any number of processes."""

    settings: Annotated[tyro.conf.OmitArgPrefixes[Recipe], tyro.conf.arg(name="recipe")]
    run: tyro.conf.FlagCreatePairsOff[tyro.conf.OmitArgPrefixes[Run]] = field(default_factory=Run)
    recipe: str = "default"
    """Recipe that provides the settings below: default, classic (the original script's settings), fast,
    accurate, your own TOML file, or a run's folder (its recipe). Flags override its settings."""
    ensemble: int = 1
    """Train this many networks one after another, with seeds counting up from --seed, and combine them by
    voting."""

    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also write TensorBoard event files to the run's folder."""

    detach: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run in the background, also after the terminal has closed. dmnist watch shows the run, and dmnist
    stop ends it."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check everything and show what the run would do, without training, downloading or writing."""
    summary: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the model layer by layer, without training: type, shape of the output, and parameters."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown data set, invalid values, or flags that cannot be combined."""
        if self.tensorboard and find_spec("tensorboard") is None:
            raise UsageError(f"--tensorboard needs the package tensorboard: {install('tensorboard')}")
        if self.detach and (self.dry_run or self.summary):
            raise UsageError("--detach is for a run: --dry-run and --summary end by themselves")
        require_name(self.run.dataset)
        require_count(self, "ensemble")
        out = self.run.out
        if self.ensemble == 1 and self.run.resume == "auto" and out and (members := members_in(out)):
            raise UsageError(f"{out} is an ensemble: add --ensemble {len(members)}")
        if self.ensemble > 1 and self.run.resume not in (None, "auto"):
            raise UsageError(
                "--ensemble can only resume with --resume auto: a checkpoint holds just one network"
            )


@dataclass(frozen=True)
class Verify(CommonFlags):
    """Run a known-answer test on this machine: train a small job in exact arithmetic, whose answer is the
    same on every machine, in each process alone and in all together. Names the rank, step and layer that
    are wrong. Also under torchrun, srun or mpirun."""

    nproc: int | None = None
    """Number of processes (default: one per GPU, or per core from 2 to 4). With --chaos, the most."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU; cuda, mps or xpu
    demand an accelerator of this kind."""
    minutes: float | None = None
    """Repeat the test for this long and count failures: each process alone, all together, and pairs in
    rotation, which tell a bad link from a bad device."""
    inject: str | None = None
    """Flip one bit, to see that it is found: RANK:STEP or RANK:STEP:KIND, where KIND is weight (default),
    activation or message. FROM-TO:STEP is a bad link: it flips a bit each time that one rank sends to the
    other in this step."""
    sync: Annotated[Literal["tree"] | None, tyro.conf.arg(metavar="tree")] = None
    """Instead, train a job with --sync tree in fp32, and compare with the known answer of this platform."""
    chaos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Instead, train that job while injecting faults at random times: kill, suspend or terminate processes,
    change the number of processes, corrupt checkpoints. The result must be the same."""
    faults: int | None = None
    """With --chaos, the number of faults (default: 8)."""
    seed: int | None = None
    """With --chaos, the seed for the faults (default: random; the seed is printed). With --inject, the seed
    that chooses the bit (default: 0)."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        require_count(self, "nproc", "faults")
        require(self.seed is None or self.seed >= 0, "seed", "zero or more", self)
        require(self.minutes is None or 0 < self.minutes < 1e6, "minutes", "above zero", self)
        if self.faults is not None and not self.chaos:
            raise UsageError("--faults only goes with --chaos")
        if self.seed is not None and not self.chaos and self.inject is None:
            raise UsageError("--seed only goes with --chaos or --inject")
        if self.chaos and self.sync:
            raise UsageError("--chaos does not go with --sync tree: it trains the same job")
        for name in ("minutes", "inject"):
            if getattr(self, name) is not None and (self.chaos or self.sync):
                raise UsageError(
                    f"{flag(name)} does not go with {'--chaos' if self.chaos else '--sync tree'}"
                )
        if self.inject is not None:
            Injection.parse(self.inject)


SECTIONS = ("startup", "data", "scaling", "exchange", "time-to-99", "recipes")
"""The sections of `dmnist bench`, in the order in which it measures them."""


@dataclass(frozen=True)
class Bench(CommonFlags):
    """Benchmark this machine: startup, data loading, throughput and scaling compared to a plain training
    loop, gradient exchange, and time to 99 % accuracy. Takes a few minutes on an otherwise idle machine. On
    a GPU, measures steps with and without CUDA graphs, and every recipe."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure: startup, data, scaling, exchange, time-to-99, recipes (default: all; on a CPU, all
    but recipes, which takes many minutes there)."""
    recipe: str = "default"
    """Recipe for startup and scaling."""
    nproc: int | None = None
    """Measure with 1, 2, ... up to N processes (default: one per GPU, or one per core and at most 4)."""
    runs: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of repetitions of each measurement."""
    seeds: int = 5
    """Number of runs for time-to-99."""
    seconds: float = 2.0
    """Approximate training time of each scaling run, in seconds."""
    dataset: str = "auto"
    """Data set. auto uses mnist if available, otherwise generated digits."""
    data: Path = Path("data")
    """Data folder. Missing files are downloaded into it."""
    out: Path | None = None
    """Folder for the results (bench.json) and their plot (bench.svg)."""
    device: Device = "auto"
    """auto measures a GPU or other accelerator if there is one; cpu always measures the CPU; cuda, mps or
    xpu demand an accelerator of this kind."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for invalid values."""
        if unknown := [name for name in self.sections if name not in SECTIONS]:
            raise UsageError(f"bench has no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
        require_count(self, "runs", "seeds", "nproc")
        require(0 < self.seconds <= 3600, "seconds", "above zero and at most 3600", self)
        require_name(self.dataset)
