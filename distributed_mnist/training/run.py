"""One rank's life in a `dmnist train`: connect, get the data, make or resume the state, train, report."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.digest import digest
from ..config import Recipe, Run, checkpoint_interval, steps_between
from ..data.broadcast import Data, broadcast_dataset
from ..data.datasets import Dataset
from ..distributed.world import World
from ..errors import DmnistError, Interrupted, OutputError, WorkerLost, reason
from ..launcher.signals import StopRequests
from ..models.zoo import Traits, find_factory
from ..optim.schedule import make_optimizer
from ..reporting.events import JsonLines, MistakesFile, MultiSink, Notices, NullSink, Sink
from ..reporting.terminal import Terminal
from ..runs import layout
from ..runs.checkpoint_store import NullStore, Store
from ..runs.layout import write_json
from ..runs.lock import RunLock
from ..runs.record import read as read_record
from ..runs.run_folder import RunFolder, open_folder, open_store
from .batches import Batches
from .evaluate import Evaluation
from .loop import Job, State, require_same_weights, train
from .resume import described, read_named, refuse_mismatch, require_one_recipe, resume
from .setup import make_gradients, make_model, oversubscription, pack, use_threads


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
) -> dict[str, Any]:
    """Train, and return what `--json` prints.

    `title` is the recipe's name, for people; `read` gives the data set, and is called on rank 0 alone.
    `resume_flags` are the flags with which a person goes on, where they are not just this run's.
    """
    began = time.perf_counter()
    require_one_recipe(world, recipe)
    find_factory(recipe.model)  # what is cheap to refuse is refused before waiting for the data
    named = read_named(world, options)
    threads = use_threads(world, recipe)
    data = broadcast_dataset(world, read)
    model, traits = world.on_every_rank(lambda: make_model(recipe, len(data.class_names), world))
    batches = Batches(data.train, recipe, data.mean, data.std)
    state = State(model, make_optimizer(recipe, model))
    gradients = make_gradients(recipe, options, world, model, traits)
    folder = open_folder(world, options, recipe, title)
    notices = remarks(world, recipe, data, threads, folder)
    save_steps, save_seconds = checkpoint_interval(options.checkpoint_every, batches.steps_per_epoch)
    try:
        store = open_store(world, options, folder, save_seconds)
        refuse = partial(refuse_mismatch, recipe=recipe, data=data)
        resumed = resume(
            world, options, folder, store, named, state, refuse=refuse, complain=notices.append
        )
        require_same_weights(state, world)
        board = partial(make_tensorboard, folder.path, recipe, data, state.step)
        sink = make_sink(world, folder.path, store, console, board if tensorboard else None)
        config = described(recipe, options, data)
        world.on_rank_zero(lambda: write_json(folder.path / "config.json", config))
    except DmnistError:
        if folder.lock is not None:
            folder.lock.abandon()
        raise
    job = Job(
        recipe=recipe,
        world=world,
        batches=batches,
        test=data.test,
        gradients=gradients,
        reseed=traits.draws_random_numbers,
        store=store,
        sink=sink,
        pack=partial(pack, state, recipe, data, options, batches.steps_per_epoch),
        stop_requested=signals.requested,
        evaluation={
            "classes": len(data.class_names),
            "mean": data.mean,
            "std": data.std,
            "precision": recipe.precision,
        },
        save_every=save_steps,
        eval_every=steps_between(options.eval_every, batches.steps_per_epoch, "eval_every"),
    )
    total = recipe.total_steps(batches.steps_per_epoch)
    sink.log(
        "start",
        lines=describe(world, recipe, data, traits, title, threads, folder.path),
        world_size=world.size,
        step=state.step,
        steps=total,
        epochs=recipe.epochs,
        again=folder.restarted,
        ranks=[{"rank": peer.rank, "host": peer.host, "pid": peer.pid} for peer in world.peers],
    )
    gone_on = f"resumed from {resumed} at step {state.step} of {total}"
    for text in [*notices, gone_on] if resumed else notices:
        sink.log("notice", text=text)
    signals.arm(resume_flags := resume_flags or layout.resume_flags(folder.path))
    with released_on_failure(folder.lock):
        try:
            result = train_and_sum_up(state, job, data, folder.path, began)
            sink.log("end", result=result)
        except Interrupted as error:
            sink.log("stop", step=state.step)
            raise Interrupted(f"{error}; go on with {resume_flags}") from None
        except WorkerLost as error:
            by_itself = "torchrun may start it again; else " if world.launcher == "torchrun" else ""
            raise WorkerLost(f"{error}; {by_itself}go on with {resume_flags}") from error
        finally:
            store.finished(wait=True)  # what is being written is kept, however this ends
            sink.close()
    if folder.lock is not None:  # else it is another rank's to write
        finish(folder.path, folder.lock, state, result, partial(console.print, soft_wrap=True))
    return result


def remarks(world: World, recipe: Recipe, data: Data, threads: int, folder: RunFolder) -> list[str]:
    """What a person should know before it starts."""
    lines = [] if folder.restarted else oversubscription(world, threads)
    if world.restarts and not folder.restarted:
        lines.append(f"{world.launcher} has started this again, but no run of its is known here")
    if recipe.batch_size > len(data.train):
        images = f"the {len(data.train):,} training images"
        lines.append(f"--batch-size {recipe.batch_size} is more than {images}")
    return lines


@contextlib.contextmanager
def released_on_failure(lock: RunLock | None) -> Iterator[None]:
    """Let others into the run's folder if it fails: this process may live on."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def finish(
    path: Path, lock: RunLock, state: State, result: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Write the result and let others in. Raises `OutputError` if the final weights are not on disk."""
    from ..reporting import html_report  # noqa: PLC0415 - imports what only the end needs

    try:
        write_json(path / "result.json", result)
    except OutputError as error:
        raise OutputError(f"trained, but {error}; make room, then {layout.resume_flags(path)}") from None
    finally:
        lock.release()
    try:
        html_report.write([read_record(path)], path / "report.html")
    except DmnistError as error:
        say(f"no report: {error}")
    if state.unsaved:
        raise OutputError(f"trained, but {state.unsaved}")


def train_and_sum_up(state: State, job: Job, data: Data, folder: Path, began: float) -> dict[str, Any]:
    """Train to the end; what the run came to, and how fast it was since this process started."""
    steps_before, seconds_before = state.step, state.train_seconds
    evaluation = train(state, job)
    images = job.batches.images_before(state.step) - job.batches.images_before(steps_before)
    seconds_here = state.train_seconds - seconds_before
    return {
        **outcome(state, job.recipe, data, evaluation),
        "world_size": job.world.size,
        "device": job.world.device.type,
        "steps_here": state.step - steps_before,
        "seconds_here": seconds_here,
        "images_per_second": images / seconds_here if images else None,
        "total_seconds": time.perf_counter() - began,
        "out": str(folder),
    }


def outcome(state: State, recipe: Recipe, data: Data, evaluation: Evaluation) -> dict[str, Any]:
    """What a run came to, as it is the same wherever and however it ran (but for the seconds)."""
    return {
        "dataset": data.name,
        "model": recipe.model,
        "sync": recipe.sync,
        "epochs": recipe.epochs,
        "steps": state.step,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": evaluation.images,
        "weights_sha256": digest(dict(state.model.state_dict())),
        "samples_sha256": state.samples_sha256,
        "data_sha256": data.sha256,
        "train_seconds": state.train_seconds,
    }


def make_sink(
    world: World,
    folder: Path,
    store: Store,
    console: Console,
    board: Callable[[Callable[[str], None]], Sink] | None = None,
) -> Sink:
    """Rank 0 tells the terminal, the run's files, and what `board` makes; the others nothing, or what goes
    wrong with a copy."""
    if world.rank != 0:
        return NullSink() if isinstance(store, NullStore) else Notices(str(world.peers[world.rank]))
    terminal = Terminal(console)

    def complain(text: str) -> None:
        terminal.log("notice", text=text)

    lines = JsonLines(folder / "metrics.jsonl", complain)
    sinks: list[Sink] = [lines, MistakesFile(folder / "mistakes.json", complain), terminal]
    return MultiSink(*sinks, *([board(complain)] if board else []))


def make_tensorboard(
    folder: Path, recipe: Recipe, data: Data, step: int, complain: Callable[[str], None]
) -> Sink:
    """A sink for TensorBoard. Raises `OutputError`."""
    from ..reporting.tensorboard import TensorBoard  # noqa: PLC0415 - an extra

    try:
        return TensorBoard(folder / "tensorboard", recipe, data.class_names, step, complain)
    except OSError as error:
        raise OutputError(f"{folder}: {reason(error)}") from None


def describe(
    world: World, recipe: Recipe, data: Data, traits: Traits, title: str, threads: int, folder: Path
) -> dict[str, str]:
    """The lines a run begins with."""
    how = "tree" if recipe.sync == "tree" else "DistributedDataParallel"
    group = _count(world.size, "process", "processes")
    if world.size > 1:
        group += f" ({world.launcher}, {world.backend})"
    length = _count(recipe.epochs, "epoch")
    if recipe.steps:
        length = f"at most {_count(recipe.steps, 'step')} or {length}"
    per = f", {_count(threads, 'thread')} each" if world.device.type == "cpu" else ""
    return {
        "recipe": f"{title}: {recipe.model} with {traits.parameters:,} parameters, "
        f"{length} in batches of {recipe.batch_size}, "
        f"{how} over {_count(recipe.shards, 'shard')}, {recipe.precision}, seed {recipe.seed}",
        "data": f"{data.name}, {len(data.train):,} + {len(data.test):,} images, {data.source}",
        "world": f"{group} on {world.device.type}{per}",
        "out": str(folder),
    }


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
