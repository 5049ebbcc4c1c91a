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
from ..common.generators import ModelDraws
from ..common.process_state import defined_state
from ..config import Recipe, Run, checkpoint_interval, flag, steps_between
from ..data.broadcast import Data, broadcast_dataset
from ..data.datasets import Dataset
from ..distributed.world import World
from ..errors import Interrupted, OutputError, WorkerLost, reason
from ..gradients.loss import make_loss
from ..gradients.setup import make_gradients
from ..launcher.signals import StopRequests
from ..models.build import make_model
from ..models.factory import find_factory
from ..models.inspection import ModelProperties
from ..optim.schedule import make_optimizer
from ..reporting.events import Callback, JsonLines, MistakesFile, MultiSink, NoticeSink, NullSink, Sink
from ..reporting.progress_bar import Terminal
from ..runs import layout
from ..runs.checkpoint_store import NullStore, Store
from ..runs.initial_weights import load_initial_weights, read_initial_weights
from ..runs.lock import RunLock
from ..runs.run_files import write_config
from ..runs.run_folder import open_folder, open_store
from ..user_code.failures import model_failures
from ..user_code.functions import find
from .batches import Batches
from .loop import require_same_weights, train
from .notices import add_place, log_start, start_lines, start_notices
from .plan import make_plan
from .platforms import agree_on_platform, use_threads
from .results import write_results
from .resume import read_requested_checkpoint, resume, run_config
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
    recipe.check_size(world.size)
    # Cheap checks come first: reading the data takes long.
    world.on_every_rank(lambda: find_functions(recipe))
    requested = read_requested_checkpoint(world, options)
    recipe, platform_notices = agree_on_platform(world, recipe, options, requested)
    threads = use_threads(world, recipe.sync)  # after a user's module is imported, which may set them too
    data = broadcast_dataset(world, read).with_validation(recipe)
    batches = Batches(data.train, recipe, data.mean, data.std)
    state, properties = make_state(world, recipe, data, options)
    loss = world.on_every_rank(lambda: make_loss(recipe, len(data.class_names), world.device))
    gradients = make_gradients(recipe, options, world, state.model, properties, batches.smallest_size())
    if dry_run:
        return make_plan(
            world,
            options,
            title,
            state,
            batches,
            data,
            recipe,
            requested,
            threads,
            partial(start_lines, world, recipe, data, properties, title, threads),
            platform_notices,
        )
    save_steps, save_seconds = checkpoint_interval(options.checkpoint_every, batches.steps_per_epoch)
    folder = open_folder(world, options, recipe, title, signals.process)
    try:
        notices = [*platform_notices, *start_notices(world, recipe, data, threads, folder)]
        lines = start_lines(world, recipe, data, properties, title, threads, folder.path)
        store = open_store(world, options, folder, save_seconds)
        resumed = resume(
            world, options, folder, store, requested, state, recipe, data, complain=notices.append
        )
        require_same_weights(state, world)
        world.on_rank_zero(
            lambda: write_config(folder.path, run_config(recipe, options, data, world.device)), NoneType
        )
        sink = world.on_every_rank(
            lambda: make_sink(
                world,
                folder.path,
                store,
                console,
                partial(make_tensorboard, folder.path, recipe, data, state.step) if tensorboard else None,
                on_event,
            )
        )
    except BaseException:
        if folder.lock is not None:
            folder.lock.abandon()
        raise
    with lock_released_on_failure(folder.lock):
        try:
            context = TrainingContext(
                recipe=recipe,
                options=options,
                world=world,
                data=data,
                batches=batches,
                gradients=gradients,
                loss=loss,
                draws=ModelDraws(properties.draws_from) if properties.draws_from else None,
                store=store,
                sink=sink,
                stop_requested=signals.requested,
                save_every=save_steps,
                eval_every=steps_between(recipe.eval_every, batches.steps_per_epoch, "eval_every"),
            )
            if resumed:
                notices.append(f"resumed from {resumed} at step {state.step} of {batches.total_steps}")
            log_start(state, context, lines, notices, again=folder.restarted)
            signals.arm(resume_flags := resume_flags or layout.resume_flags(folder.path))
            with model_failures(recipe.model, partial(add_place, state, context, resume_flags)):
                result = train_and_summarise(state, context, folder.path, began)
            sink.log("end", result=result)
        except Interrupted as error:
            sink.log("stop", step=state.step)
            raise Interrupted(f"{error}; resume with {resume_flags}") from None
        except WorkerLost as error:
            torchrun = "torchrun may restart it; otherwise " if world.launcher == "torchrun" else ""
            raise WorkerLost(f"{error}; {torchrun}resume with {resume_flags}") from error
        finally:
            store.finished(wait=True)  # however the run ends, keep the checkpoint that is being written
            sink.close()
    if folder.lock is not None:  # only rank 0 has it
        write_results(folder.path, folder.lock, state, result, partial(console.print, soft_wrap=True))
    return result


def find_functions(recipe: Recipe) -> None:
    """Import the user's own functions. Raises `UsageError` if there is no function of a name."""
    find_factory(recipe.model)
    for field, name in recipe.code().items():
        find(flag(field), name)


def make_state(world: World, recipe: Recipe, data: Data, options: Run) -> tuple[State, ModelProperties]:
    """Make the model with its initial weights, and the optimizer. Return also the model's properties."""
    classes, shape = len(data.class_names), data.image_shape
    model, properties = world.on_every_rank(lambda: make_model(recipe, classes, world.device, shape))
    initial_sha256 = ""
    if options.init_from is not None:
        name, raw = world.on_rank_zero(
            partial(read_initial_weights, Path(options.init_from)), tuple[str, bytes]
        )
        initial_sha256 = world.on_every_rank(lambda: load_initial_weights(model, name, raw))
    optimizer = world.on_every_rank(lambda: make_optimizer(recipe, model))
    return State(model, optimizer, initial_sha256=initial_sha256), properties


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
        "device": context.world.device.type,
        "steps_here": state.step - steps_before,
        "seconds_here": seconds_here,
        "images_per_second": images / seconds_here if images else None,
        "total_seconds": time.perf_counter() - began,
        "out": str(folder),
    }


def make_sink(
    world: World,
    folder: Path,
    store: Store,
    console: Console,
    make_tensorboard_sink: Callable[[Callable[[str], None]], Sink] | None = None,
    on_event: Callable[[dict[str, Any]], object] | None = None,
) -> Sink:
    """Make this rank's sink.

    On rank 0 the sink writes to the terminal, to the run's files, and to TensorBoard if
    `make_tensorboard_sink` is given; then it calls `on_event`, if given. On other ranks it prints notices
    if the rank keeps a copy of the checkpoints, and nothing otherwise.
    """
    if world.rank != 0:
        return NullSink() if isinstance(store, NullStore) else NoticeSink(str(world.peers[world.rank]))
    terminal = Terminal(console)

    def complain(text: str) -> None:
        terminal.log("notice", text=text)

    lines = JsonLines(folder / "metrics.jsonl", complain)
    sinks: list[Sink] = [lines, MistakesFile(folder / "mistakes.json", complain), terminal]
    if make_tensorboard_sink is not None:
        sinks.append(make_tensorboard_sink(complain))
    if on_event is not None:
        sinks.append(Callback(on_event, world.status))
    return MultiSink(*sinks)


def make_tensorboard(
    folder: Path, recipe: Recipe, data: Data, step: int, complain: Callable[[str], None]
) -> Sink:
    """Make a sink for TensorBoard. Raises `OutputError`."""
    from ..reporting.tensorboard import TensorBoard  # noqa: PLC0415 - an optional dependency

    try:
        return TensorBoard(folder / layout.TENSORBOARD, recipe, data.class_names, step, complain)
    except OSError as error:
        raise OutputError(f"{folder}: {reason(error)}") from None
