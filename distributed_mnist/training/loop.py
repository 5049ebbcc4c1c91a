"""The loop. A run is a function of the step: resuming is the same range with another start."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.digest import START_OF_CHAIN, digest
from ..common.random_keys import torch_seed
from ..config import Recipe
from ..data.split import Split
from ..distributed.world import World
from ..errors import Interrupted, TrainingError
from ..gradients.all_reduce import Gradients
from ..gradients.loss import cross_entropy
from ..optim import weight_average
from ..optim.optimizers import Optimizer
from ..optim.schedule import make_schedule, set_learning_rate
from ..reporting.events import Sink
from ..runs.checkpoint import Content, load_optimizer, load_weights
from ..runs.checkpoint_store import Store
from .batches import Batches
from .evaluate import Evaluation, evaluate, forward
from .ledger import Ledger
from .mistakes import mistakes
from .sync_points import PhaseTimer, SyncPoints, advice

_DISK_SECONDS = 300.0  # a slow disk is not a hang
_READER_SECONDS = 3600.0  # nor is a terminal that somebody holds with Ctrl-S
_ENOUGH_STEPS = 20  # to tell what a step takes
NO_TOTALS: dict[str, float] = {"loss": 0.0, "correct": 0, "images": 0}


@dataclass
class State:
    """Everything that a step changes; the same on every rank."""

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    """Steps done."""
    best_accuracy: float = -1.0
    samples_sha256: str = START_OF_CHAIN
    """Digest of the sample ids consumed so far, in order."""
    train_seconds: float = 0.0
    """Spent in steps, evaluation and saving left out."""
    unsaved: str | None = None
    """What went wrong with the latest checkpoint, where one could not be written."""
    totals: dict[str, float] = field(default_factory=lambda: dict(NO_TOTALS))
    """Since the last evaluation: sum of losses, hits, images."""

    def to_content(self) -> Content:
        """The part of a checkpoint that is state."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best_accuracy": self.best_accuracy,
            "samples_sha256": self.samples_sha256,
            "train_seconds": self.train_seconds,
            "totals": dict(self.totals),
        }

    def restore(self, content: Content, name: str) -> None:
        """Take over a checkpoint's state. Raises `CheckpointError` if it is another model's."""
        load_weights(self.model, content["model"], name)
        load_optimizer(self.optimizer, content["optimizer"], name)
        self.step = content["step"]
        self.best_accuracy = content["best_accuracy"]
        self.samples_sha256 = content["samples_sha256"]
        self.train_seconds = content["train_seconds"]
        self.totals = dict(content["totals"])


@dataclass(frozen=True)
class Job:
    """What the loop works with; none of it changes while it runs."""

    recipe: Recipe
    world: World
    batches: Batches
    test: Split
    gradients: Gradients
    reseed: bool
    """The model draws random numbers: key them before each pass."""
    store: Store
    sink: Sink
    pack: Callable[[], Content]
    """The checkpoint of this moment."""
    stop_requested: Callable[[], bool]
    evaluation: dict[str, Any]
    """Keyword arguments of `evaluate`."""
    save_every: int | None
    """Steps between checkpoints; None where the store's clock decides."""
    eval_every: int
    """Steps between evaluations."""


def train(state: State, job: Job) -> Evaluation:
    """Train to the end of the recipe and return the last evaluation.

    Raises `Interrupted` after saving a checkpoint if any rank was asked to stop, and `TrainingError` if
    the loss is not finite.
    """
    recipe, world = job.recipe, job.world
    total = recipe.total_steps(job.batches.steps_per_epoch)
    lr_at = make_schedule(recipe, job.batches.steps_per_epoch)
    unaveraged = total - recipe.averaged_steps(total)
    if unaveraged < state.step < total:
        weight_average.require(state.optimizer)
    largest = job.batches.size(0)
    room = max(1, min(256, 2**20 // largest))  # steps a ledger holds: about 8 MiB of sample ids
    ledger = Ledger(room, largest, world.device)
    pace, laps = SyncPoints(world, state.step, room), PhaseTimer(world)
    result, advised = None, world.size == 1
    state.model.train()
    world.status.enter("training")
    pace.start()
    for step in range(state.step, total):
        world.status.at(step + 1)
        set_learning_rate(state.optimizer, lr_at(step))
        train_step(state, job, ledger, laps, step)
        state.step = step + 1
        last = state.step == total
        if step >= unaveraged:
            with laps.lap("optimizer"):
                weight_average.join(state.optimizer, step - unaveraged)
        if last and unaveraged < total:
            weight_average.adopt(state.optimizer)
        evaluating = state.step % job.eval_every == 0 or last
        saving = last or (job.save_every is not None and state.step % job.save_every == 0)
        if not (evaluating or saving or pace.due(state.step)):
            continue
        stopping, due = pace.sync(state.step, stop=job.stop_requested(), save=job.store.due())
        stopping = stopping and not last
        close_interval(state, job, ledger, pace, laps, lr_at(step))
        if not advised and pace.steps >= _ENOUGH_STEPS:
            advised = True
            if text := advice(world.size, pace.seconds / pace.steps, pace.exchange_seconds / pace.steps):
                report(job, "notice", text=text)
        best = False
        if evaluating:
            world.status.enter("evaluating")
            result = evaluate(state.model, job.test, world, **job.evaluation)
            best = log_evaluation(state, job, result) or (last and unaveraged < total)
        if saving or due or stopping or best:
            save(state, job, best=best)
        note_saved(state, job, wait=stopping or last)
        if stopping:
            world.barrier()  # nobody leaves before the checkpoint is on disk: a launcher would end the rest
            saved = f"but {state.unsaved}" if state.unsaved else "checkpoint saved"
            raise Interrupted(f"stopped by a signal after step {state.step} of {total}, {saved}")
        world.status.enter("training")
        pace.start()
    return result or evaluate(state.model, job.test, world, **job.evaluation)


def train_step(state: State, job: Job, ledger: Ledger, laps: PhaseTimer, step: int) -> None:
    """One step on one global batch. Nothing waits for the device, but for what is drawn of distortions."""
    recipe, size = job.recipe, job.batches.size(step)
    ledger.open(step, size)

    def pass_of(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        with laps.lap("data"):
            batch = job.batches.take(step, shards)
        if job.reseed:
            torch.manual_seed(torch_seed("noise", recipe.seed, step, shards.start))
        with laps.lap("forward"):
            logits = forward(module, batch.images, recipe.precision)
            losses, gradient = cross_entropy(logits, batch.labels, recipe.label_smoothing)
        ledger.record(batch, losses, logits)
        return logits, gradient.div_(size)

    with laps.lap("backward"):
        job.gradients.compute(pass_of, job.batches.shard_sizes(step))
    with laps.lap("optimizer"):
        state.optimizer.step()


def require_same_weights(state: State, world: World) -> None:
    """Raise `TrainingError` naming the ranks whose weights are not rank 0's: the promise, looked at.

    Bad memory, another processor, or a model whose factory rolls its own dice would break it silently.
    """
    if world.size > 1 and (ranks := world.differing(digest(dict(state.model.state_dict())))):
        raise TrainingError(
            f"rank {', '.join(map(str, ranks))} holds other weights than rank 0 after step {state.step}: "
            "the model is random by other means than torch's generator, or that host computes differently"
        )


def save(state: State, job: Job, *, best: bool) -> None:
    """Begin to write a checkpoint of this moment; the training goes on meanwhile."""
    require_same_weights(state, job.world)
    with job.world.status.during("saving a checkpoint", _DISK_SECONDS):
        job.store.save(job.pack, best=best)


def note_saved(state: State, job: Job, *, wait: bool) -> None:
    """Report checkpoints that have been written; one that could not be costs safety, not the run."""
    with job.world.status.during("saving a checkpoint", _DISK_SECONDS if wait else 0):
        finished = job.store.finished(wait=wait)
    for saved in finished:
        told, state.unsaved = state.unsaved is not None, saved.problem
        if saved.problem and told:
            continue  # a disk that stays full is told of once
        if saved.problem:
            text = f"{saved.problem}; training goes on, last good checkpoint: {job.store.last_good()}"
            report(job, "notice", text=text)
        else:
            report(job, "checkpoint", step=saved.step, path=saved.path, seconds=saved.seconds)


def close_interval(
    state: State, job: Job, ledger: Ledger, pace: SyncPoints, laps: PhaseTimer, lr: float
) -> None:
    """At a sync point: complete the record of the steps since the last one, and look at the losses."""
    page, state.samples_sha256 = ledger.close(job.world, state.samples_sha256)
    state.train_seconds += pace.seconds
    if (bad := page.first_bad_step()) is not None:
        raise TrainingError(
            f"the loss is not finite at step {bad + 1}: a smaller --lr may help; last good checkpoint: "
            f"{job.store.last_good()}"
        )
    if not all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        raise TrainingError(
            f"the weights are not finite after step {state.step}: a smaller --lr may help; last good "
            f"checkpoint: {job.store.last_good()}"
        )
    totals = state.totals
    totals["loss"] += page.loss_sum
    totals["correct"] += page.correct
    totals["images"] += page.images
    report(
        job,
        "steps",
        step=state.step,
        epoch=state.step / job.batches.steps_per_epoch,
        loss=page.loss_sum / page.images,
        lr=lr,
        images_per_second=page.images / pace.seconds,
        seconds={
            "step": pace.seconds / max(pace.steps, 1),
            "exchange": pace.exchange_seconds / max(pace.steps, 1),
            **laps.close(pace.steps),
        },
        ranks={"busy": pace.busy, "exchange": pace.communicating},
        first_step=page.first_step + 1,
        losses=page.losses,
    )


def report(job: Job, event: str, **fields: Any) -> None:
    """Tell an event."""
    with job.world.status.during("reporting", _READER_SECONDS):
        job.sink.log(event, **fields)


def log_evaluation(state: State, job: Job, result: Evaluation) -> bool:
    """Report an evaluation and start new totals; whether it is the best so far."""
    if not math.isfinite(result.loss):
        raise TrainingError(f"the test loss is not finite after step {state.step}: a smaller --lr may help")
    best = result.accuracy > state.best_accuracy
    state.best_accuracy = max(state.best_accuracy, result.accuracy)
    totals, state.totals = state.totals, dict(NO_TOTALS)
    report(
        job,
        "evaluation",
        step=state.step,
        epoch=state.step / job.batches.steps_per_epoch,
        train_loss=totals["loss"] / totals["images"],
        train_accuracy=totals["correct"] / totals["images"],
        test_loss=result.loss,
        test_accuracy=result.accuracy,
        test_images=result.images,
        confusion=result.confusion,
        best=best,
    )
    report(job, "mistakes", step=state.step, mistakes=mistakes(result, job.test))
    return best
