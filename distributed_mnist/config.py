"""Settings of a run: `Recipe` decides the weights; `Run` says which data, where and how.

Both are frozen and validated when they are created, so the rest of the program need not check them. A
recipe is a small TOML file; the built-in recipes are in `recipes/`. The docstrings of both classes and of
their fields are the help texts of the command line. `__post_init__` documents what is raised.
"""

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from .common.printable import shortened
from .common.suggest import did_you_mean, unknown
from .errors import UsageError, reason

Sync = Literal["tree", "ddp"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adam", "adamw", "sgd", "muon"]
Schedule = Literal["constant", "step", "cosine", "one-cycle"]
Device = Literal["auto", "cpu"]

DATA_OPTIONS = ("dataset", "data", "train_size", "test_size", "data_seed")  # fields of `Run`
_RECIPES = resources.files("distributed_mnist") / "recipes"
_MOST = {"nproc": 1024, "shards": 1024, "ensemble": 1024, "train_size": 5_000_000, "test_size": 5_000_000}
_STEPS_OR_EPOCHS = re.compile(r"(\d{1,18})\s*(steps?|epochs?)?")
_DURATION = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*(s|seconds?|min|minutes?)")


@dataclass(frozen=True)
class Run:
    """Which data a run uses, where it runs and writes, and how.

    Apart from the choice of data and the kind of device, nothing here changes the weights. (With `--sync
    ddp`, the number of processes and `micro_batch` change the rounding.)
    """

    dataset: str = "mnist"
    """mnist, fashion-mnist, kmnist, qmnist, emnist-SPLIT, generated (synthetic digits), idx (your own
    files), or auto (mnist if available, otherwise generated)."""
    data: Path = Path("data")
    """Data folder. Missing files are downloaded into it."""
    train_size: int = 60_000
    """Number of training images to generate, with --dataset generated."""
    test_size: int = 10_000
    """Number of test images to generate, with --dataset generated."""
    data_seed: int = 0
    """Seed for the digits, with --dataset generated."""
    out: Path | None = None
    """Folder for checkpoints and logs (default: a new folder under runs/)."""
    resume: str | None = None
    """Checkpoint to resume from, or auto for the newest valid one in --out."""
    checkpoint_every: str = "5 seconds"
    """How often to save a checkpoint, in the background: in seconds or minutes ('5 seconds'), steps (500)
    or epochs ('2 epochs')."""
    eval_every: str = "1 epoch"
    """How often to evaluate on the test images: in steps (500) or epochs ('2 epochs')."""
    keep: int = 3
    """How many of the newest checkpoints to keep, in addition to the best one."""
    max_restarts: int = 3
    """If a process dies, restart all processes from the last checkpoint. Give up after this many restarts
    in a row without a new checkpoint. (Other launchers have their own restart settings.)"""
    hang_after: float = 60.0
    """If a process makes no progress for this many seconds, the others report it and exit."""
    nproc: int | None = None
    """Number of processes to start on this host (default: one per GPU; on CPU, as many as speed it up)."""
    device: Device = "auto"
    """auto uses a GPU or other accelerator if there is one; cpu always uses the CPU."""
    micro_batch: int | None = None
    """With --sync ddp, the most images to put through the model at once, to save memory (default: the
    process's whole share of the batch). With tree it is one shard, or several shards up to 512 images."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for field in dataclasses.fields(self):
            _check_type(flag(field.name), field, getattr(self, field.name))
        require_count(self, "train_size", "test_size", "keep", "nproc", "micro_batch")
        require(0 <= self.data_seed < 2**63, "data_seed", "between 0 and 2^63 - 1", self)
        require(self.max_restarts >= 0, "max_restarts", "zero or more", self)
        require(1 <= self.hang_after < math.inf, "hang_after", "at least 1", self)
        checkpoint_interval(self.checkpoint_every, 1)
        steps_between(self.eval_every, 1, "eval_every")
        if self.dataset not in ("generated", "auto"):
            for name in ("train_size", "test_size", "data_seed"):
                if getattr(self, name) != getattr(Run, name):
                    raise UsageError(f"{flag(name)} only goes with --dataset generated")
        if self.resume == "auto" and self.out is None:
            raise UsageError("--resume auto needs --out: the folder of the run to resume")


def steps_between(text: str, steps_per_epoch: int, name: str) -> int:
    """Return a number of steps: 500 for "500" or "500 steps", twice `steps_per_epoch` for "2 epochs".

    Raises `UsageError`, naming the flag of the field `name`.
    """
    match = _STEPS_OR_EPOCHS.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag(name)} must be like 500 (steps) or '2 epochs', not {text[:99]!r}")
    return int(match[1]) * (steps_per_epoch if (match[2] or "").startswith("epoch") else 1)


def checkpoint_interval(text: str, steps_per_epoch: int) -> tuple[int | None, float | None]:
    """Parse `--checkpoint-every`: (steps, None), or for a duration (None, seconds). Raises `UsageError`."""
    match = _DURATION.fullmatch(text.strip())
    if match and float(match[1]) > 0:
        return None, float(match[1]) * (60 if match[2].startswith("m") else 1)
    try:
        return steps_between(text, steps_per_epoch, "checkpoint_every"), None
    except UsageError as error:
        raise UsageError(str(error).replace("like 500", "like '5 seconds', 500")) from None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, apart from the data."""

    model: str = "cnn"
    """linear, mlp, cnn, cnn-small, cnn-large, or your own as package.module:factory, where factory(classes)
    returns a torch module. The package may be in the current directory or installed."""
    epochs: int = 3
    """Number of passes over the training images."""
    steps: int = 0
    """Maximum number of steps. The run ends there even in the middle of an epoch. 0 means no limit."""
    batch_size: int = 256
    """Images per step, summed over all processes (the global batch)."""
    optimizer: Optimizer = "adam"
    """Optimizer. muon orthogonalizes the updates of hidden layers and uses Adam for all other weights."""
    lr: float = 0.001
    """Learning rate. If the schedule changes it, this is the peak."""
    beta1: float = 0.9
    """Adam's decay rate for the running mean of gradients."""
    beta2: float = 0.999
    """Adam's decay rate for the running mean of squared gradients."""
    momentum: float = 0.9
    """Momentum, with sgd and muon."""
    adam_lr: float = 0.005
    """With --optimizer muon, the peak learning rate of the weights that Adam updates: biases and the last
    layer."""
    weight_decay: float = 0.0
    """Weight decay: decoupled with adamw and muon, otherwise added to the gradient."""
    schedule: Schedule = "constant"
    """How the learning rate changes over the run."""
    decay_every: int = 10
    """With --schedule step, number of epochs between decays."""
    decay_factor: float = 0.1
    """With --schedule step, factor by which each decay multiplies the learning rate."""
    warmup: float = 0.25
    """With --schedule one-cycle or cosine, fraction of all steps over which the learning rate rises."""
    final_div: float = 1000.0
    """With --schedule one-cycle, the peak learning rate divided by the final one."""
    average: float = 0.0
    """Average the weights over this last fraction of all steps and use the mean as the final weights. With
    one-cycle, use a --final-div of 5 to 20: at a learning rate near zero the weights hardly change."""
    label_smoothing: float = 0.0
    """Fraction of each target's probability to spread evenly over all classes."""
    shift: float = 0.0
    """Augmentation: random shift of up to this many pixels in each direction."""
    rotate: float = 0.0
    """Augmentation: random rotation of up to this many degrees in each direction."""
    scale: float = 0.0
    """Augmentation: random zoom, in or out, by up to this fraction."""
    seed: int = 0
    """Seed for everything random: initial weights, sample order, augmentation and dropout."""
    sync: Sync = "tree"
    """How gradients are summed. tree gives bit-identical results at any number of processes; ddp
    (DistributedDataParallel) gives the same results up to rounding."""
    shards: int = 8
    """Number of parts each global batch is split into. This is also the maximum number of processes."""
    precision: Precision = "fp32"
    """Precision of the model's arithmetic: fp32, or bf16 via autocast (weights stay in fp32)."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        require_count(self, "epochs", "batch_size", "decay_every", "shards")
        for name in ("steps", "weight_decay", "shift", "rotate"):
            require(0 <= getattr(self, name) < math.inf, name, "zero or more", self)
        for name in ("beta1", "beta2", "momentum", "label_smoothing", "scale"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", self)
        for name in ("lr", "adam_lr", "decay_factor"):
            require(0 < getattr(self, name) < math.inf, name, "above zero", self)
        require(1 <= self.final_div < math.inf, "final_div", "at least 1", self)
        for name in ("warmup", "average"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", self)
        fits = self.schedule != "one-cycle" or not self.average or self.warmup + self.average < 1
        require(fits, "average", f"below 1 - --warmup {self.warmup}, where one-cycle falls", self)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1", self)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run."""
        total = self.epochs * steps_per_epoch
        return min(self.steps, total) if self.steps else total

    def averaged_steps(self, total: int) -> int:
        """Return how many of the last of `total` steps the weights are averaged over; 0 for no average."""
        return max(1, round(self.average * total)) if self.average else 0

    def check_size(self, world_size: int) -> None:
        """Raise `UsageError` if there are more ranks than shards: some would have nothing to do."""
        if world_size > self.shards:
            raise UsageError(
                f"{world_size} processes cannot share {self.shards} shards: start at most {self.shards}, "
                f"or use --shards {world_size} or more (the weights depend on the number of shards)"
            )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in the order of the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """Invert `to_dict`; missing fields take defaults. Raises `UsageError`, which names `where`."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"{where}: there is no recipe field {name!r}{did_you_mean(name, known)}")
            _check_type(f"{where}: {name}", known[name], value)
        try:
            args: dict[str, Any] = {k: float(v) if known[k].type is float else v for k, v in values.items()}
            return cls(**args)
        except (UsageError, OverflowError) as error:
            raise UsageError(f"{where}: {error}") from None

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Return the differences that change the weights: for each field name, the values (self, other).

        With a constant or stepwise learning rate and no average, a longer run begins exactly like a shorter
        one. Then the numbers of epochs and steps are ignored.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        if self.schedule in ("constant", "step") and not self.average:
            theirs |= {name: mine[name] for name in ("epochs", "steps")}
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def require(condition: bool, name: str, rule: str, owner: object) -> None:
    """Raise `UsageError` unless `condition`; the message says that the flag of `name` must be `rule`."""
    if not condition:
        raise UsageError(f"{flag(name)} must be {rule}, not {getattr(owner, name)}")


def require_count(owner: object, *names: str) -> None:
    """Raise `UsageError` if one of these fields is less than 1 or too large. None is allowed."""
    for name in names:
        value, most = getattr(owner, name), _MOST.get(name, 10**9)
        require(value is None or value >= 1, name, "at least 1", owner)
        require(value is None or value <= most, name, f"at most {most}", owner)


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", Path: "a path", type(None): "None"}


def _fits(value: object, kind: Any) -> bool:
    """Return whether a value has a field's type. Callers from Python may pass anything."""
    if choices := getattr(kind, "__args__", ()):  # a union, or a Literal
        return any(
            _fits(value, choice) if isinstance(choice, type) else value == choice for choice in choices
        )
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _check_type(name: str, field: dataclasses.Field[Any], value: object) -> None:
    """Raise `UsageError` if a value does not have the field's type. `name` names it in the message."""
    if not _fits(value, field.type):
        types = getattr(field.type, "__args__", (field.type,))
        allowed = " or ".join(_TYPE_NAMES.get(kind, str(kind)) for kind in types)
        raise UsageError(f"{name} must be {allowed}, not {shortened(repr(value))}")


def flag(name: str) -> str:
    """Return a field's command-line flag."""
    return "--" + name.replace("_", "-")


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(Path(entry.name).stem for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Return the built-in recipe `name`, or the recipe in the TOML file `name`. Raises `UsageError`."""
    names = recipe_names()
    if name in names:
        return Recipe.from_dict(tomllib.loads((_RECIPES / f"{name}.toml").read_text()), f"recipe {name}")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(unknown("recipe", name, names, ", or give a .toml file"))
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
