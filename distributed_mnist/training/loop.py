"""The training loop.

Each step depends only on the state and the step number, so a resumed run is the same loop with a different
first step. Read `train` first. It takes one step after another and pauses at sync points. At a sync point
the ranks combine their metrics, evaluate the model, save checkpoints, and agree whether to stop.
"""

from functools import partial
from typing import NoReturn

from ..common.digest import digest
from ..config import Recipe
from ..distributed.world import World
from ..errors import Interrupted, TrainingError, UsageError
from ..optim import weight_average
from ..optim.schedule import make_schedule, set_learning_rate
from .evaluate import Evaluation
from .forward import make_forward
from .ledger import IntervalRecord, Ledger
from .selection import evaluate_and_choose, patience_is_over, result_of, steps_left
from .state import State, TrainingContext, pack, report
from .step.captured_step import make_step
from .sync_points import PhaseTimer, SyncPoints

_DISK_PATIENCE_SECONDS = 300.0  # a slow disk is not a hang
_MIN_STEPS_TO_JUDGE_SPEED = 20


def train(state: State, context: TrainingContext) -> Evaluation:
    """Train to the end of the recipe and return the scores of the result on the test images.

    Raises `Interrupted`, after saving a checkpoint, if any rank was asked to stop. Raises `TrainingError`
    if the loss or the weights are not finite, or if the weights differ between ranks.
    """
    recipe, world, batches = context.recipe, context.world, context.batches
    total_steps = batches.total_steps
    lr_at = make_schedule(recipe, batches.steps_per_epoch)
    averaging_start = total_steps - recipe.averaged_steps(total_steps)
    averages_weights = averaging_start < total_steps
    resume_averages(state, recipe, averaging=averaging_start < state.step < total_steps)

    max_interval = max(1, min(256, 2**20 // batches.size(0)))  # steps: about 8 MiB of sample ids
    ledger = Ledger(max_interval, batches.size(0), world.device)
    sync_points = SyncPoints(world, state.step, max_interval)
    timer = PhaseTimer(world)
    take_step = make_step(state, context, ledger, timer)
    evaluation = None
    speed_judged = world.size == 1

    prepare(state, context)
    sync_points.start()
    for step in steps_left(state, context):
        world.status.begin_step(step + 1)
        set_learning_rate(state.optimizer, lr_at(step))
        take_step(step)
        state.step = step + 1
        is_last = state.step == total_steps
        if step >= averaging_start:
            with timer.phase("optimizer"):
                weight_average.update(state.optimizer, step - averaging_start)
        if is_last and averages_weights:
            apply_mean(state, context, timer, averaging_start)

        must_evaluate = is_last or state.step % context.eval_every == 0
        must_save = is_last or (context.save_every is not None and state.step % context.save_every == 0)
        if not (must_evaluate or must_save or sync_points.due(state.step)):
            continue

        stop_requested, save_due = sync_points.sync(
            state.step, stop=context.stop_requested(), save=context.store.due()
        )
        close_interval(state, context, ledger, sync_points, timer, lr_at(step))
        if not speed_judged and sync_points.steps >= _MIN_STEPS_TO_JUDGE_SPEED:
            speed_judged = True
            if hint := sync_points.speed_hint():
                report(context, "notice", text=hint)
        is_best = False
        if must_evaluate:
            evaluation, is_best = evaluate_and_choose(state, context)
            is_last = is_last or patience_is_over(state, context)
        stopping = stop_requested and not is_last
        if must_save or save_due or stopping or is_best or is_last:
            save(state, context, best=is_best)
        report_saved(state, context, wait=stopping or is_last)
        if stopping:
            stop(state, world, total_steps)
        if is_last:
            break
        world.status.enter("training")
        sync_points.start()
    return result_of(state, context, evaluation)


def resume_averages(state: State, recipe: Recipe, *, averaging: bool) -> None:
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


def prepare(state: State, context: TrainingContext) -> None:
    """Choose how to compute gradients, and check them before the first step."""
    state.model.train()
    if not steps_left(state, context):
        return
    context.world.status.enter("comparing gradients")
    forward_shards = make_forward(context, PhaseTimer(context.world), 0)
    context.gradients.prepare(forward_shards, context.batches.shard_sizes(0))
    check_gradients(state, context, state.step)
    context.world.status.enter("training")


def close_interval(
    state: State,
    context: TrainingContext,
    ledger: Ledger,
    sync_points: SyncPoints,
    timer: PhaseTimer,
    lr: float,
) -> None:
    """Combine, check and report the records of all ranks since the last sync point."""
    interval, state.samples_sha256 = ledger.close(context.world, state.samples_sha256)
    state.train_seconds += sync_points.seconds
    require_finite(state, context, interval)
    for loss_sum in interval.loss_sums:  # step by step, because where an interval ends depends on the time
        state.totals["loss"] += loss_sum
    state.totals["correct"] += interval.correct
    state.totals["images"] += interval.images
    report(
        context,
        "steps",
        step=state.step,
        epoch=state.step / context.batches.steps_per_epoch,
        loss=interval.mean_loss,
        lr=lr,
        images_per_second=interval.images / sync_points.seconds,
        seconds={
            "step": sync_points.seconds / max(sync_points.steps, 1),
            "exchange": sync_points.exchange_seconds / max(sync_points.steps, 1),
            **timer.reset(sync_points.steps),
        },
        ranks={
            "busy": sync_points.compute_per_step,
            "exchange": sync_points.exchange_per_step,
            **({"share": context.parts.shares()} if context.parts else {}),
        },
        first_step=interval.first_step + 1,
        losses=interval.losses,
    )
    if context.parts:
        context.parts.adjust(sync_points.compute_per_step)


def require_finite(state: State, context: TrainingContext, interval: IntervalRecord) -> None:
    """Raise `TrainingError` if a loss of this interval or a weight is not finite."""
    if (bad_step := interval.first_bad_step()) is not None:
        problem = f"the loss is not finite at step {bad_step + 1}"
    elif not all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        problem = f"the weights are not finite after step {state.step}"
    else:
        return
    raise TrainingError(
        f"{problem}: a smaller --lr may help; last good checkpoint: {context.store.last_good()}"
    )


def require_same_weights(state: State, world: World) -> None:
    """Raise `TrainingError`, naming the ranks, if any rank has different weights from rank 0.

    Faulty memory, a different processor, or a factory whose weights depend on the process would make the
    weights differ without any other sign.
    """
    if world.size > 1 and (ranks := world.differing(digest(dict(state.model.state_dict())))):
        raise TrainingError(
            f"rank {', '.join(map(str, ranks))} has different weights from rank 0 after step {state.step}: "
            "the model has a random generator or a state of its own, or that host computes differently"
        )


def check_gradients(state: State, context: TrainingContext, step: int) -> None:
    """Raise an error if the ranks compute different gradients of global batch `step`, see `gradients`.

    They would still have the same weights: wrong ones, because all add the same gradients.
    """
    forward_shards = make_forward(context, PhaseTimer(context.world), step)
    try:
        with context.world.status.during("comparing gradients", 0):
            context.gradients.check(forward_shards, context.batches.shard_sizes(step))
    except (TrainingError, UsageError) as error:
        report_saved(state, context, wait=True)
        when = f"noticed after step {state.step}, last good checkpoint: {context.store.last_good()}"
        told = type(error)(f"{error}; {when}")
        told.on_one_rank = error.on_one_rank
        raise told from error


def save(state: State, context: TrainingContext, *, best: bool) -> None:
    """Check the run and start to write a checkpoint. Training continues while it is written."""
    check_gradients(state, context, state.step - 1)
    require_same_weights(state, context.world)
    with (
        context.world.status.during("saving a checkpoint", _DISK_PATIENCE_SECONDS),
        weight_average.moving_average_in_place(state.optimizer),
    ):
        context.store.save(partial(pack, state, context), best=best)


def report_saved(state: State, context: TrainingContext, *, wait: bool) -> None:
    """Report the checkpoints written since the last call; `wait` for those still being written.

    A failed write does not stop the run. A later crash would cost more steps, but not change the result.
    """
    with context.world.status.during("saving a checkpoint", _DISK_PATIENCE_SECONDS if wait else 0):
        written = context.store.finished(wait=wait)
    for saved in written:
        failed_before, state.unsaved = state.unsaved is not None, saved.problem
        if saved.problem is None:
            report(context, "checkpoint", step=saved.step, path=saved.path, seconds=saved.seconds)
        elif not failed_before:  # a disk that stays full is reported once
            last_good = context.store.last_good()
            text = f"{saved.problem}; training continues, last good checkpoint: {last_good}"
            report(context, "notice", text=text)


def stop(state: State, world: World, total_steps: int) -> NoReturn:
    """Wait for all ranks and raise `Interrupted`.

    Without the wait, a rank could exit before the checkpoint is on disk, and a launcher would then end the
    other ranks.
    """
    world.barrier()
    outcome = f"but {state.unsaved}" if state.unsaved else "checkpoint saved"
    raise Interrupted(f"stopped by a signal after step {state.step} of {total_steps}, {outcome}")
