"""Evaluate during training, choose the weights that are the run's result, and stop early.

Without a validation split, evaluations score the test images, and the last weights are the result. With
one, evaluations score the validation images, and the result is the weights with the best accuracy there;
only they are scored on the test images, at the end. The accuracies have the same bits on every rank and at
any number of processes, so all ranks choose and stop alike.
"""

import math

from ..data.split import Split
from ..errors import TrainingError
from ..optim import weight_average
from ..runs.checkpoint import load_weights, snapshot
from .evaluate import Evaluation, evaluate, mistakes
from .state import ZERO_TOTALS, State, TrainingContext, report


def steps_left(state: State, context: TrainingContext) -> range:
    """Return the steps that a run has yet to take; none after early stopping."""
    total_steps = context.batches.total_steps
    return range(total_steps if patience_is_over(state, context) else state.step, total_steps)


def patience_is_over(state: State, context: TrainingContext) -> bool:
    """Return whether the run stops early."""
    return 0 < context.recipe.patience <= state.evaluations_since_best


def evaluate_and_choose(state: State, context: TrainingContext) -> tuple[Evaluation, bool]:
    """Evaluate the weights and report it. If they are the best on a validation split, keep a copy of them.

    Returns the evaluation, and whether its accuracy is better than all before. Raises `TrainingError` if
    the loss is not finite.
    """
    split = context.data.validation
    with weight_average.moving_average_in_place(state.optimizer):
        result = _evaluate(state, context, split or context.data.test)
        is_best = result.accuracy > state.best_accuracy
        if is_best and split is not None:
            state.best_weights = snapshot(state.model.state_dict())
    state.evaluations_since_best += 1
    if is_best:
        state.best_accuracy, state.best_step, state.evaluations_since_best = result.accuracy, state.step, 0
    totals, state.totals = state.totals, dict(ZERO_TOTALS)
    report(
        context,
        "evaluation",
        step=state.step,
        epoch=state.step / context.batches.steps_per_epoch,
        train_loss=totals["loss"] / totals["images"],
        train_accuracy=totals["correct"] / totals["images"],
        **result.figures("validation" if split else "test"),
        confusion=result.confusion,
        best=is_best,
    )
    _report_mistakes(state.step, context, result, split)
    if patience_is_over(state, context) and state.step < context.batches.total_steps:
        waited = state.evaluations_since_best
        evaluations = f"{waited} evaluations have" if waited > 1 else "one evaluation has"
        text = f"stopped early, after step {state.step} of {context.batches.total_steps}: {evaluations}"
        best = f"the {state.best_accuracy:.2%} after step {state.best_step}"
        report(context, "notice", text=f"{text} not improved on {best} (--patience)")
    return result, is_best


def result_of(state: State, context: TrainingContext, last: Evaluation | None) -> Evaluation:
    """Put the weights that are the result into the model, and return their scores on the test images.

    `last` is the evaluation after the last step, or None if this process took no step.
    """
    if context.data.validation is None:
        weight_average.exchange(state.optimizer)  # the moving average, if there is one, is the result
        return last or _evaluate(state, context, context.data.test)
    load_weights(state.model, state.best_weights, "the best state of this run")
    result = _evaluate(state, context, context.data.test)
    report(
        context,
        "test",
        step=state.best_step,
        epoch=state.best_step / context.batches.steps_per_epoch,
        **result.figures("test"),
        confusion=result.confusion,
    )
    _report_mistakes(state.best_step, context, result, None)
    return result


def _evaluate(state: State, context: TrainingContext, split: Split) -> Evaluation:
    """Evaluate the model; with `tree`, ranks must compute the same bits."""
    context.world.status.enter("evaluating")
    recipe = context.recipe
    exact = recipe.sync == "tree" or recipe.precision == "exact"
    result = evaluate(
        state.model,
        context.data,
        context.world,
        recipe.precision,
        recipe.model,
        exact=exact,
        split=split,
        parts=context.parts,
    )
    if not math.isfinite(result.loss):
        name = "test" if split is context.data.test else "validation"
        raise TrainingError(
            f"the {name} loss is not finite after step {state.step}: a smaller --lr may help"
        )
    return result


def _report_mistakes(
    step: int, context: TrainingContext, result: Evaluation, validation: Split | None
) -> None:
    """Report the wrong images. Validation images are numbered as in the training set, which they end."""
    data = context.data
    report(
        context,
        "mistakes",
        step=step,
        images="validation" if validation else "test",
        image_shape=data.image_shape,
        mistakes=mistakes(result, validation or data.test, first=len(data.train) if validation else 0),
    )
