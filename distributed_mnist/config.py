"""What a run is asked to do: `Recipe`, which decides the weights, and `Run`, which does not.

Both are frozen and checked when they are made, so the rest of the program never doubts them. A recipe
is a small TOML file; `recipes/` holds the ones that come with the program. The docstrings of the two and of
their fields are the command line's help; what is raised is said at `__post_init__`.
"""

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from .common.suggest import did_you_mean, unknown
from .errors import UsageError, reason

Sync = Literal["tree", "ddp"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adam", "adamw", "sgd", "muon"]
Schedule = Literal["constant", "step", "cosine", "one-cycle"]


Device = Literal["auto", "cpu"]

DATA_OPTIONS = ("dataset", "data", "train_size", "test_size", "data_seed")
"""The fields of `Run` that say what is trained on."""
_RECIPES = resources.files("distributed_mnist") / "recipes"
_EVERY = re.compile(r"(\d+)\s*(steps?|epochs?)?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|seconds?|min|minutes?)")


@dataclass(frozen=True)
class Run:
    """Where a run takes its data and puts its results, and how it is carried out; the weights come out the
    same."""

    dataset: str = "mnist"
    """mnist, fashion-mnist, kmnist, qmnist, emnist-SPLIT, generated (drawn digits), idx (your own files),
    or auto (mnist if it can be had, else generated)."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
    train_size: int = 60_000
    """Training images to draw, with --dataset generated."""
    test_size: int = 10_000
    """Test images to draw, with --dataset generated."""
    data_seed: int = 0
    """Seed of the drawn digits, with --dataset generated."""
    out: Path | None = None
    """Folder for the run's checkpoints and records; by default a new one under runs/."""
    resume: str | None = None
    """Checkpoint to go on from, or auto for the newest whole one in --out."""
    checkpoint_every: str = "5 seconds"
    """How often a checkpoint is saved, beside the training: in seconds or minutes ('5 seconds'), steps
    (500) or epochs ('2 epochs')."""
    eval_every: str = "1 epoch"
    """How often the test images are scored: in steps (500) or in epochs ('2 epochs')."""
    keep: int = 3
    """How many of the newest checkpoints are kept, besides the best one."""
    max_restarts: int = 3
    """When a process dies, all are started again from the last checkpoint: at most this often in a row
    without reaching a new one. (A launcher of another program restarts by rules of its own.)"""
    hang_after: float = 60.0
    """Seconds that the others wait for a process that does not go on, before they name it and end."""
    nproc: int | None = None
    """Processes to start here; by default one per GPU, or on CPU as many as pay off."""
    device: Device = "auto"
    """auto takes a GPU or other accelerator if there is one, cpu never does."""
    micro_batch: int | None = None
    """With --sync ddp, the most images that go through the model at once, to save memory; by default all
    of a process's share. (tree takes one shard, or several of 512 images in all.)"""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for field in dataclasses.fields(self):
            if not _fits(getattr(self, field.name), field.type):
                told = f"{_kind(field.type)}, not {getattr(self, field.name)!r}"
                raise UsageError(f"{flag(field.name)} must be {told}")
        for name in ("train_size", "test_size", "keep"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        for name in ("nproc", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", self)
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
            raise UsageError("--resume auto needs --out: the folder of the run to go on with")


def steps_between(text: str, steps_per_epoch: int, name: str) -> int:
    """ "500" or "500 steps" to 500; "2 epochs" to twice `steps_per_epoch`. Raises `UsageError`."""
    match = _EVERY.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag(name)} must be like 500 (steps) or '2 epochs', not {text!r}")
    return int(match[1]) * (steps_per_epoch if (match[2] or "").startswith("epoch") else 1)


def checkpoint_interval(text: str, steps_per_epoch: int) -> tuple[int | None, float | None]:
    """`--checkpoint-every` as (steps, None), or a time as (None, seconds). Raises `UsageError`."""
    match = _TIME.fullmatch(text.strip())
    if match and float(match[1]) > 0:
        return None, float(match[1]) * (60 if match[2].startswith("m") else 1)
    try:
        return steps_between(text, steps_per_epoch, "checkpoint_every"), None
    except UsageError as error:
        raise UsageError(str(error).replace("like 500", "like '5 seconds', 500")) from None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data."""

    model: str = "cnn"
    """linear, mlp, cnn, cnn-small, cnn-large, or your own as package.module:factory: factory(classes) is
    called and returns a torch module. It is found from the current directory, or in installed packages."""
    epochs: int = 3
    """How many times to go through the training images."""
    steps: int = 0
    """The most steps to take: the run ends there, in the midst of an epoch if need be. 0 sets no limit."""
    batch_size: int = 256
    """Images per step, over all processes together (the global batch)."""
    optimizer: Optimizer = "adam"
    """Optimizer; muon makes the steps of hidden layers orthogonal, and leaves the rest to Adam."""
    lr: float = 0.001
    """Learning rate; where the schedule moves it, the highest."""
    beta1: float = 0.9
    """Adam's decay of the running mean of gradients."""
    beta2: float = 0.999
    """Adam's decay of the running mean of squared gradients."""
    momentum: float = 0.9
    """Momentum of sgd and muon."""
    adam_lr: float = 0.005
    """With --optimizer muon, the highest learning rate of what Adam does: biases and the last layer."""
    weight_decay: float = 0.0
    """Weight decay: decoupled with adamw and muon, otherwise added to the gradient."""
    schedule: Schedule = "constant"
    """How the learning rate changes over the steps."""
    decay_every: int = 10
    """With --schedule step, epochs between two decays."""
    decay_factor: float = 0.1
    """With --schedule step, what the rate is multiplied by at each decay."""
    warmup: float = 0.25
    """With --schedule one-cycle or cosine, the fraction of all steps in which the rate rises."""
    final_div: float = 1000.0
    """With --schedule one-cycle, what the highest rate is divided by at the end."""
    average: float = 0.0
    """Fraction of all steps, the last ones, whose weights are averaged: at the end the mean replaces them.
    one-cycle has fallen by then, and wants a --final-div of 5 to 20: a rate of about zero moves nothing."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread evenly over all classes."""
    shift: float = 0.0
    """Augmentation by random shifts, of at most this many pixels each way."""
    rotate: float = 0.0
    """Augmentation by random rotation, of at most this many degrees each way."""
    scale: float = 0.0
    """Augmentation by random zoom, of at most this fraction each way."""
    seed: int = 0
    """Seed of everything random: initial weights, order of samples, augmentation, dropout."""
    sync: Sync = "tree"
    """How gradients are added up: tree gives the same bits at any number of processes, ddp
    (DistributedDataParallel) the same up to rounding."""
    shards: int = 8
    """Parts that a global batch is cut into: at most this many processes can share it."""
    precision: Precision = "fp32"
    """Arithmetic of the model: fp32, or bf16 by autocast (the weights stay fp32)."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for name in ("epochs", "batch_size", "decay_every", "shards"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        for name in ("steps", "weight_decay", "shift", "rotate"):
            require(0 <= getattr(self, name) < math.inf, name, "zero or more", self)
        for name in ("beta1", "beta2", "momentum", "label_smoothing", "scale"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", self)
        for name in ("lr", "adam_lr", "decay_factor"):
            require(0 < getattr(self, name) < math.inf, name, "above zero", self)
        require(1 <= self.final_div < math.inf, "final_div", "at least 1", self)
        for name in ("warmup", "average"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", self)
        falls = self.schedule != "one-cycle" or not self.average or self.warmup + self.average < 1
        require(falls, "average", f"below 1 - --warmup {self.warmup}, where one-cycle falls", self)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1", self)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        every = self.epochs * steps_per_epoch
        return min(self.steps, every) if self.steps else every

    def averaged_steps(self, total: int) -> int:
        """How many of `total` steps, the last ones, have their weights averaged; 0 where none are."""
        return max(1, round(self.average * total)) if self.average else 0

    def check_size(self, world_size: int) -> None:
        """Raise `UsageError` for more ranks than shards: some would have nothing to do."""
        if world_size > self.shards:
            raise UsageError(
                f"{world_size} processes cannot share {self.shards} shards: start {self.shards} at most, "
                f"or use --shards {world_size} or more (a recipe's answer depends on its shards)"
            )

    def replace(self, **changes: Any) -> Self:
        """A recipe that differs in these fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Field names to plain values, in the order of the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """The inverse of `to_dict`; missing fields take their defaults. `where` is named in errors."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"{where}: there is no recipe field {name!r}{did_you_mean(name, known)}")
            _check_type(known[name], value, where)
        try:
            floats = {name for name, field in known.items() if field.type is float}
            fields: dict[str, Any] = {k: float(v) if k in floats else v for k, v in values.items()}
            return cls(**fields)
        except (UsageError, OverflowError) as error:
            raise UsageError(f"{where}: {error}") from None

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Fields in which two recipes differ in a way that moves the weights: name to (self, other).

        The numbers of epochs and steps count only where something looks ahead to the run's end: with a
        constant or stepwise rate, and no average taken, a longer run begins exactly like a shorter one.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        if self.schedule in ("constant", "step") and not self.average:
            theirs |= {name: mine[name] for name in ("epochs", "steps")}
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def require(good: bool, name: str, rule: str, owner: object) -> None:
    """Raise `UsageError`, naming the flag and its value, unless `good`."""
    if not good:
        raise UsageError(f"{flag(name)} must be {rule}, not {getattr(owner, name)}")


_WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", type(None): "None"}


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type; from Python, anything may be given."""
    if choices := getattr(kind, "__args__", ()):  # of a union, or a Literal
        return any(
            _fits(value, choice) if isinstance(choice, type) else value == choice for choice in choices
        )
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _kind(kind: Any) -> str:
    choices = getattr(kind, "__args__", (kind,))
    return " or ".join(_WORDS.get(choice, str(choice)) for choice in choices)


def _check_type(field: dataclasses.Field[Any], value: object, where: str) -> None:
    if not _fits(value, field.type):
        choices = getattr(field.type, "__args__", None)
        told = f"one of {', '.join(choices)}" if choices else _kind(field.type)
        raise UsageError(f"{where}: {field.name} must be {told}, not {value!r}")


def flag(name: str) -> str:
    """A field's name as its command-line flag."""
    return "--" + name.replace("_", "-")


def recipe_names() -> list[str]:
    """The recipes that come with the program."""
    return sorted(Path(entry.name).stem for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the one in the TOML file of that path. Raises `UsageError`."""
    names = recipe_names()
    if name in names:
        text = (_RECIPES / f"{name}.toml").read_text()
        return Recipe.from_dict(tomllib.loads(text), f"recipe {name}")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(unknown("recipe", name, names, ", or give a .toml file"))
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
