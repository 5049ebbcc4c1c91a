"""The state that training changes, and the objects that the training loop works with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.digest import START_OF_CHAIN
from ..common.generators import ModelDraws
from ..config import Recipe, Run
from ..data.broadcast import Data
from ..distributed.world import World
from ..errors import CheckpointError
from ..exact.scales import Scales
from ..gradients.exact.parts import Parts
from ..gradients.interface import Gradients
from ..gradients.loss import Loss
from ..reporting.events import Sink
from ..runs.checkpoint import FORMAT, Content, load_weights, versions
from ..runs.checkpoint_store import Store
from ..runs.optimizer_state import load_optimizer
from .batches import Batches

_SCALARS = (
    "step",
    "best_accuracy",
    "best_step",
    "evaluations_since_best",
    "samples_sha256",
    "train_seconds",
)
"""Fields of `State` that a checkpoint stores as they are."""
_OUTPUT_PATIENCE_SECONDS = 3600.0  # a terminal paused with Ctrl-S is not a hang
ZERO_TOTALS: dict[str, float] = {"loss": 0.0, "correct": 0, "images": 0}


@dataclass
class State:
    """Everything that a step changes. It is the same on every rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scales: Scales | None = None
    """What decides how exact arithmetic rounds; None in other precisions."""
    step: int = 0
    """Number of completed steps."""
    best_accuracy: float = -1.0
    """The best accuracy so far, on the validation images if there are any, else on the test images."""
    best_step: int = 0
    """The step after which it was reached first."""
    evaluations_since_best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The weights that had it, on the CPU; empty without a validation split."""
    samples_sha256: str = START_OF_CHAIN
    """Digest of all sample ids used so far, in order."""
    train_seconds: float = 0.0
    """Time spent in steps, without evaluation and saving."""
    unsaved: str | None = None
    """Why the latest checkpoint could not be written; None if it was written."""
    totals: dict[str, float] = field(default_factory=lambda: dict(ZERO_TOTALS))
    """Since the last evaluation: sum of losses, number of correct predictions, number of images."""

    def to_content(self) -> Content:
        """Return this state as part of a checkpoint's content."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scales": torch.zeros(0) if self.scales is None else self.scales.before,
            **{scalar: getattr(self, scalar) for scalar in _SCALARS},
            "best_weights": self.best_weights,
            "totals": dict(self.totals),
        }

    def restore(self, content: Content, name: str) -> None:
        """Load the state from a checkpoint.

        Raises `CheckpointError` if it is from a different model, or lacks the scales of exact arithmetic.
        """
        if content["best_weights"]:
            load_weights(self.model, content["best_weights"], name)  # checks them
        load_weights(self.model, content["model"], name)
        load_optimizer(self.optimizer, content["optimizer"], name, steps=content["step"])
        if self.scales is not None:
            if content["step"] and not len(content["scales"]):  # others would give other weights
                raise CheckpointError(
                    f"{name} lacks the scales of exact arithmetic: resume from another checkpoint"
                )
            self.scales.restore(content["scales"])
        for scalar in _SCALARS:
            setattr(self, scalar, content[scalar])
        self.best_weights = content["best_weights"]
        self.totals = dict(content["totals"])


@dataclass(frozen=True)
class TrainingContext:
    """Everything that the loop uses and does not replace."""

    recipe: Recipe
    options: Run
    world: World
    data: Data
    batches: Batches
    gradients: Gradients
    loss: Loss
    draws: ModelDraws | None
    """The model's draws from global generators, which are seeded before each forward pass; None without."""
    store: Store
    sink: Sink
    stop_requested: Callable[[], bool]
    save_every: int | None
    """Steps between checkpoints; None if the store saves by elapsed time."""
    eval_every: int
    """Steps between evaluations."""
    parts: Parts | None = None
    """The ranks' parts of a batch in exact arithmetic; None in other precisions."""
    captured: bool = False
    """Whether to capture steps as graphs."""


def pack(state: State, context: TrainingContext) -> Content:
    """Return a checkpoint's content for the current state."""
    data, options = context.data, context.options
    drawn = {"seed": options.data_seed, "train_size": options.train_size, "test_size": options.test_size}
    return {
        "format": FORMAT,
        **state.to_content(),
        "recipe": context.recipe.to_dict(),
        "dataset": {**data.to_dict(), **(drawn if data.name == "generated" else {})},
        "steps_per_epoch": context.batches.steps_per_epoch,
        "versions": versions(context.world.device),
    }


def report(context: TrainingContext, event: str, **fields: Any) -> None:
    """Send an event to the sink, which may be a terminal that blocks."""
    with context.world.status.during("reporting", _OUTPUT_PATIENCE_SECONDS):
        context.sink.log(event, **fields)
