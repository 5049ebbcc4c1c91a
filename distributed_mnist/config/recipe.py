"""`Recipe`: the settings that decide the weights, apart from the data."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..common.suggest import did_you_mean, unknown
from ..errors import UsageError
from .fields import check_type, flag, require, require_count
from .intervals import steps_between

Sync = Literal["tree", "ddp"]
Precision = Literal["auto", "fp32", "bf16", "exact"]
Schedule = Literal["constant", "step", "cosine", "one-cycle"]

UNUSED_IN_EXACT = ("sync", "shards")
"""Fields that change nothing with `--precision exact`."""

_KNOWN = {"loss": ("cross-entropy",), "optimizer": ("adam", "adamw", "sgd", "muon")}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, apart from the data."""

    model: str = "cnn"
    """linear, mlp, cnn, cnn-small, cnn-large, or your own as package.module:factory, where factory(classes)
    or factory(classes, shape) returns a torch module. The package may be in the current directory or
    installed."""
    epochs: int = 3
    """Number of passes over the training images."""
    steps: int = 0
    """Maximum number of steps. The run ends there even in the middle of an epoch. 0 means no limit."""
    batch_size: int = 256
    """Images per step, summed over all processes (the global batch)."""
    loss: str = "cross-entropy"
    """cross-entropy, or your own as package.module:function, where function(logits, labels) returns one
    loss per image. The test loss is always the cross-entropy."""
    optimizer: str = "adam"
    """adam, adamw, sgd, muon (orthogonalizes the updates of hidden layers and uses Adam for all other
    weights), or your own as package.module:function, where function(parameters, lr=...) returns a torch
    optimizer, such as torch.optim:NAdam."""
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
    ema: float = 0.0
    """Evaluate and keep an exponential moving average of the weights, with this decay per step, such as
    0.99. Not together with --average. 0 means no moving average."""
    clip: float = 0.0
    """Scale the gradient of each step down so that its global norm is at most this. 0 means no clipping."""
    validation: int | float = 0
    """Keep the last training images for validation: this many, or this fraction of them. The weights with
    the best validation accuracy are then the result, and only they are scored on the test images."""
    patience: int = 0
    """With --validation, stop after this many evaluations in a row without a better validation accuracy. 0
    means never."""
    eval_every: str = "1 epoch"
    """How often to evaluate, on the validation images if there are any, otherwise on the test images: in
    steps (500) or epochs ('2 epochs')."""
    label_smoothing: float = 0.0
    """Fraction of each target's probability to spread evenly over all classes. Only with the loss
    cross-entropy."""
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
    (DistributedDataParallel) gives the same results up to rounding. With --precision exact it has
    no effect."""
    shards: int = 8
    """Number of parts each global batch is split into. This is also the maximum number of processes. With
    --precision exact it has no effect."""
    precision: Precision = "fp32"
    """The model's arithmetic: fp32, bf16 via autocast (weights stay in fp32), or exact, which gives the
    same weights on every machine, CPU or GPU (not with an optimizer or a loss of your own). auto chooses
    bf16 if every process has hardware for it, otherwise fp32; a resumed run keeps the choice."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for impossible values."""
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known and ":" not in value:
                raise UsageError(unknown(name, value, known, ", or package.module:function"))
        for field in dataclasses.fields(self):
            check_type(flag(field.name), field, getattr(self, field.name))
        require_count(self, "epochs", "batch_size", "decay_every", "shards")
        for name in ("steps", "validation", "patience", "weight_decay", "clip", "shift", "rotate"):
            require(0 <= getattr(self, name) < math.inf, name, "zero or more", self)
        for name in ("beta1", "beta2", "momentum", "ema", "label_smoothing", "scale"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", self)
        for name in ("lr", "adam_lr", "decay_factor"):
            require(0 < getattr(self, name) < math.inf, name, "above zero", self)
        require(1 <= self.final_div < math.inf, "final_div", "at least 1", self)
        for name in ("warmup", "average"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", self)
        fits = self.schedule != "one-cycle" or not self.average or self.warmup + self.average < 1
        require(fits, "average", f"below 1 - --warmup {self.warmup}, where one-cycle falls", self)
        smoothed = self.label_smoothing and self.loss != "cross-entropy"
        require(not smoothed, "label_smoothing", "0 with a loss of your own", self)
        same_everywhere = self.precision != "exact" or ":" not in self.optimizer
        require(same_everywhere, "optimizer", "adam, adamw, sgd or muon with --precision exact", self)
        require(not (self.average and self.ema), "ema", f"0 with --average {self.average}", self)
        is_count = self.validation < 1 or isinstance(self.validation, int)
        require(is_count, "validation", "a whole number of images, or a fraction below 1", self)
        steps_between(self.eval_every, 1, "eval_every")
        if self.patience and not self.validation:
            raise UsageError("--patience needs --validation: it waits for a better validation accuracy")
        if self.patience and self.average:
            raise UsageError(
                "--patience does not go with --average: the mean of the weights exists only at the end"
            )
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1", self)

    def __repr__(self) -> str:
        """Return a call that makes this recipe: the fields that differ from their defaults."""
        fields = [
            (field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)
        ]
        changed = ", ".join(f"{name}={value!r}" for name, value, default in fields if value != default)
        return f"Recipe({changed})"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run."""
        total = self.epochs * steps_per_epoch
        return min(self.steps, total) if self.steps else total

    def averaged_steps(self, total: int) -> int:
        """Return how many of the last of `total` steps the weights are averaged over; 0 for no average."""
        return max(1, round(self.average * total)) if self.average else 0

    def validation_images(self, images: int) -> int:
        """Return how many of `images` training images are kept for validation.

        Raises `UsageError` if none is left for training, or if the fraction is less than one image.
        """
        count = round(self.validation * images) if self.validation < 1 else int(self.validation)
        if count >= images:
            raise UsageError(
                f"--validation {self.validation} leaves nothing to train on: there are {images:,} training "
                "images"
            )
        if self.validation and not count:
            raise UsageError(
                f"--validation {self.validation} is less than one of {images:,} training images"
            )
        return count

    def check_size(self, world_size: int) -> None:
        """Raise `UsageError` if there are more ranks than shards: some would have nothing to do."""
        if world_size > self.shards and self.precision != "exact":
            raise UsageError(
                f"{world_size} processes cannot share {self.shards} shards: start at most {self.shards}, "
                f"or use --shards {world_size} or more (the weights depend on the number of shards)"
            )

    def distorts(self) -> bool:
        """Return whether training images are shifted, rotated or zoomed."""
        return not self.shift == self.rotate == self.scale == 0

    def code(self) -> dict[str, str]:
        """Return the fields that name code of the user's own, with its names."""
        fields = {"model": self.model, "loss": self.loss, "optimizer": self.optimizer}
        return {field: name for field, name in fields.items() if ":" in name}

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
            check_type(f"{where}: {name}", known[name], value)
        try:
            args: dict[str, Any] = {k: float(v) if known[k].type is float else v for k, v in values.items()}
            return cls(**args)
        except (UsageError, OverflowError) as error:
            raise UsageError(f"{where}: {error}") from None

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Return the differences that change the weights: for each field name, the values (self, other).

        With a constant or stepwise learning rate, no average and no validation, a longer run begins exactly
        like a shorter one. Then the numbers of epochs and steps are ignored. With validation they count,
        because a run is also evaluated after its last step. Without validation, `eval_every` is ignored. In
        exact arithmetic, `sync` and `shards` are.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        ignored: list[str] = []
        if not self.validation:
            ignored.append("eval_every")
            if self.schedule in ("constant", "step") and not self.average:
                ignored += ["epochs", "steps"]
        if self.precision == other.precision == "exact":
            ignored += UNUSED_IN_EXACT
        theirs |= {name: mine[name] for name in ignored}
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
