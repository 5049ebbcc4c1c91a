"""Run `dmnist train` on one rank: load the data, create or resume the state, train, write the results."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from rich.console import Console

from ..common.digest import digest
from ..common.process_state import defined_state
from ..config import Recipe, Run, checkpoint_interval, steps_between
from ..data.datasets import Dataset
from ..distributed.peer import describe_devices
from ..distributed.world import World
from ..errors import Interrupted, WorkerLost
from ..launcher.signals import StopRequests
from ..reporting.events import Sink
from ..reporting.results import write_results
from ..reporting.run_sinks import make_sink, make_tensorboard
from ..runs import layout
from ..runs.checkpoint_store import Store
from ..runs.lock import RunLock
from ..runs.run_files import write_config
from ..runs.run_folder import RunFolder, open_folder, open_store
from ..user_code.failures import model_failures
from .loop import require_same_weights, train
from .notices import add_place, log_start, start_lines, start_notices
from .plan import make_plan
from .preparation import Preparation, prepare
from .resume import resume, run_config, start_from
from .state import State, TrainingContext


@defined_state()
def run(
    world: World,
    recipe: Recipe,
    options: Run,
    *,
    title: str,
    console: Console,
    signals: StopRequests,
    read: Callable[[], Dataset],
    resume_flags: str | None = None,
    tensorboard: bool = False,
    dry_run: bool = False,
    on_event: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Train, and return what `--json` prints.

    `title` is the name of the recipe in messages. `read` returns the data set and is called on rank 0 only.
    `resume_flags` are the flags that resume the run; the default is `layout.resume_flags` for its folder.
    With `dry_run`, do all that comes before the first file is written, and return `plan.make_plan`.
    `on_event` is called on rank 0, see `reporting.events.Callback`.
    Raises subclasses of `DmnistError`.
    """
    began = time.perf_counter()
    prepared = prepare(world, recipe, options, title, read)
    if dry_run:
        return make_plan(world, prepared)
    folder = open_folder(world, options, recipe, title, signals.process)
    state, resume_flags = prepared.state, resume_flags or layout.resume_flags(folder.path)

    def open_sink(store: Store) -> Sink:
        board = partial(
            make_tensorboard, folder.path, prepared.recipe, prepared.data.class_names, state.step
        )
        return make_sink(world, folder.path, store, console, board if tensorboard else None, on_event)

    try:
        context, lines, notices = start(world, prepared, folder, signals.requested, open_sink)
    except BaseException:
        if folder.lock is not None:
            folder.lock.abandon()
        raise
    with lock_released_on_failure(folder.lock):
        try:
            log_start(state, context, lines, notices, again=folder.restarted)
            signals.arm(resume_flags)
            with model_failures(prepared.recipe.model, partial(add_place, state, context, resume_flags)):
                result = train_and_summarise(state, context, folder.path, began)
            context.sink.log("end", result=result)
        except Interrupted as error:
            context.sink.log("stop", step=state.step)
            raise Interrupted(f"{error}; resume with {resume_flags}") from None
        except WorkerLost as error:
            torchrun = "torchrun may restart it; otherwise " if world.launcher == "torchrun" else ""
            raise WorkerLost(f"{error}; {torchrun}resume with {resume_flags}") from error
        finally:
            context.store.finished(wait=True)  # however the run ends, keep the checkpoint being written
            context.sink.close()
    if folder.lock is not None:  # only rank 0 has it
        say = partial(console.print, soft_wrap=True)
        write_results(folder.path, folder.lock, result, state.unsaved, say)
    return result


def start(
    world: World,
    prepared: Preparation,
    folder: RunFolder,
    stop_requested: Callable[[], bool],
    open_sink: Callable[[Store], Sink],
) -> tuple[TrainingContext, dict[str, str], list[str]]:
    """Restore or check the state and open the run's files. Return also its first lines and its notices.

    `open_sink` is called once the state is restored. Every rank must call it. Raises subclasses of
    `DmnistError`.
    """
    recipe, options, state = prepared.recipe, prepared.options, prepared.state
    data, batches = prepared.data, prepared.batches
    save_steps, save_seconds = checkpoint_interval(options.checkpoint_every, batches.steps_per_epoch)
    eval_steps = steps_between(recipe.eval_every, batches.steps_per_epoch, "eval_every")
    notices = [*prepared.notices, *start_notices(world, prepared, folder)]
    lines = start_lines(world, prepared, folder.path)
    store = open_store(world, options, folder, save_seconds)
    resumed = resume(
        world, options, folder, store, prepared.requested, state, recipe, data, complain=notices.append
    )
    if resumed is not None:
        notices.append(f"resumed from {resumed} at step {state.step} of {batches.total_steps}")
    elif options.init_from is not None:
        start_from(world, state, Path(options.init_from))
    require_same_weights(state, world)
    world.on_rank_zero(
        lambda: write_config(folder.path, run_config(recipe, options, data, world.device)), NoneType
    )
    context = TrainingContext(
        recipe=recipe,
        options=options,
        world=world,
        data=data,
        batches=batches,
        gradients=prepared.gradients,
        parts=prepared.parts,
        captured=prepared.captured,
        loss=prepared.loss,
        draws=prepared.draws,
        store=store,
        sink=world.on_every_rank(lambda: open_sink(store)),
        stop_requested=stop_requested,
        save_every=save_steps,
        eval_every=eval_steps,
    )
    return context, lines, notices


@contextlib.contextmanager
def lock_released_on_failure(lock: RunLock | None) -> Iterator[None]:
    """Release the lock of the run's folder after an exception, because the process may keep running."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def train_and_summarise(
    state: State, context: TrainingContext, folder: Path, began: float
) -> dict[str, Any]:
    """Train to the end. Return the result of the run, including its speed since this process started."""
    steps_before, seconds_before = state.step, state.train_seconds
    evaluation = train(state, context)
    recipe, data = context.recipe, context.data
    images = context.batches.images_before(state.step) - context.batches.images_before(steps_before)
    seconds_here = state.train_seconds - seconds_before
    chosen: dict[str, Any] = {}
    if data.validation is not None:
        chosen = {"best_step": state.best_step, "validation_accuracy": state.best_accuracy}
        chosen["validation_images"] = len(data.validation)
    return {
        "dataset": data.name,
        "model": recipe.model,
        "sync": recipe.sync,
        "epochs": recipe.epochs,
        "steps": state.step,
        **evaluation.figures(),
        **chosen,
        "weights_sha256": digest(dict(state.model.state_dict())),
        "samples_sha256": state.samples_sha256,
        "data_sha256": data.sha256,
        "train_seconds": state.train_seconds,
        "world_size": context.world.size,
        "device": describe_devices(context.world.peers),
        "steps_here": state.step - steps_before,
        "seconds_here": seconds_here,
        "images_per_second": images / seconds_here if images else None,
        "total_seconds": time.perf_counter() - began,
        "out": str(folder),
    }
