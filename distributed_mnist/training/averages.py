"""Averages of the weights in a run: continue them, and replace the weights with their mean."""

from ..config import Recipe
from ..optim import weight_average
from .forward import make_forward
from .state import State, TrainingContext
from .sync_points import PhaseTimer


def resume(state: State, recipe: Recipe, *, averaging: bool) -> None:
    """Continue the averages of the weights in a checkpoint. Raises `CheckpointError` if it lacks them.

    `averaging` is whether the run has begun to average its last steps.
    """
    if averaging:
        weight_average.require_mean(state.optimizer)
    if recipe.ema and state.step:
        weight_average.require_mean(state.optimizer, moving=True)
        weight_average.exchange(state.optimizer)  # in the checkpoint, the weights are the moving average


def apply_mean(state: State, context: TrainingContext, timer: PhaseTimer, start: int) -> None:
    """Replace the weights with their mean since step `start`, and compute its batch norm statistics.

    These are over the batches of the same steps, or of the last epoch if those are more.
    """
    weight_average.apply_mean(state.optimizer)
    first = max(start, state.step - context.batches.steps_per_epoch)
    context.gradients.recompute_statistics(
        (make_forward(context, timer, step), context.batches.shard_sizes(step))
        for step in range(first, state.step)
    )
