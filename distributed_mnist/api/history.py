"""The history of a run as arrays: the loss of each step, and the scores of each evaluation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Recipe
from ..errors import CheckpointError
from ..optim.schedule import make_schedule
from ..runs.record import Record

_SCORES = (
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "validation_loss",
    "validation_accuracy",
)


def history_of(record: Record) -> dict[str, NDArray[Any]]:
    """Return the history of a run by name, also if it was resumed: each step and evaluation once.

    Of each step: `step`, int64, from 1; `epoch`, the number of epochs after it; `loss`, the mean over its
    batch; `lr`, the learning rate. Of each evaluation: `evaluation_step`, `evaluation_epoch`, and as far as
    there are any `train_loss`, `train_accuracy` (both since the evaluation before), `test_loss`,
    `test_accuracy`, `validation_loss`, `validation_accuracy`. All but the steps are float64. Raises
    `CheckpointError` if `config.json` is damaged.
    """
    if not record.config:
        raise CheckpointError("; ".join(record.problems) or f"{record.path} has no config.json")
    recipe = Recipe.from_dict(record.config["recipe"], str(record.path))
    losses = [loss for event in record.steps for loss in event["losses"]]
    steps = [event["first_step"] + i for event in record.steps for i in range(len(event["losses"]))]
    steps_per_epoch = round(record.steps[-1]["step"] / record.steps[-1]["epoch"]) if steps else 1
    lr_at = make_schedule(recipe, steps_per_epoch)
    evaluations = record.evaluations
    history: dict[str, Any] = {
        "step": np.array(steps, dtype=np.int64),
        "epoch": np.array(steps) / steps_per_epoch,
        "loss": np.array(losses, dtype=np.float64),
        "lr": np.array([lr_at(step - 1) for step in steps], dtype=np.float64),
        "evaluation_step": np.array([event["step"] for event in evaluations], dtype=np.int64),
        "evaluation_epoch": np.array([event["epoch"] for event in evaluations], dtype=np.float64),
    }
    for name in _SCORES:
        if evaluations and all(name in event for event in evaluations):
            history[name] = np.array([event[name] for event in evaluations], dtype=np.float64)
    return history
