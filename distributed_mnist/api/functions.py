"""The Python API: `train`, `evaluate` and `load`. They raise the errors that the command would print.

They run the same code as the command, so the weights are the same. torch settings that a run changes are
restored when it ends.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ..common import environment
from ..common.placement import ALONE, Placement
from ..common.process_state import defined_state
from ..config import Recipe, Run
from ..data import prefetch
from ..data.broadcast import broadcast_dataset
from ..data.datasets import Dataset
from ..distributed import detect_launcher
from ..distributed.devices import choose_device
from ..distributed.peer import describe_training
from ..distributed.world import World
from ..errors import CheckpointError, UsageError, write_line
from ..inference.score import evaluate_trained, load_dataset
from ..inference.trained import CheckpointFiles, Trained, find_checkpoint, restore
from ..reporting.console import in_notebook
from ..reporting.html_report import Report, render
from ..runs import layout
from ..runs.record import read as read_record
from ..training import run as training
from ..training.evaluate import Evaluation
from ..training.evaluate import evaluate as evaluate_network
from ..user_code.functions import registered
from .arguments import (
    RUN_FIELDS,
    as_path,
    names_and_functions,
    override_recipe,
    python_number,
    resolve_dataset,
    speaks_python,
)
from .events import OnEvent
from .history import history_of
from .interrupts import StopOnInterrupt
from .multi_process import console_for, train_in_processes
from .torch_datasets import TorchData

Factory = Callable[[int], nn.Module]
"""Makes a model, given the number of classes."""
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns each sample's loss, `(n,)`, given float32 logits `(n, classes)` and int64 labels `(n,)`."""
MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer, given a list of parameters and `lr`."""
_INTERVALS = ("checkpoint_every", "eval_every")  # here they may also be integers, which count steps


@dataclass(frozen=True)
class Result:
    """The result of a training run.

    The final weights are those after the last step or, with `validation`, those with the best validation
    accuracy.
    """

    accuracy: float
    """Fraction of the test images that the final weights classify correctly."""
    loss: float
    """Mean cross-entropy on the test images, in nats."""
    steps: int
    """Number of steps taken."""
    weights_sha256: str
    samples_sha256: str
    data_sha256: str
    out: Path
    """The run's folder."""
    validation_accuracy: float | None = None
    """Fraction of the validation images that the final weights classify correctly; None without any."""
    best_step: int | None = None
    """The step after which the network had the final weights; None without validation images."""
    _model: str | Factory | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return (
            f"<Result: {self.accuracy:.2%} of the test images, loss {self.loss:.4f}, {self.steps} steps, "
            f"weights {self.weights_sha256[:8]}…, in {self.out}>"
        )

    @speaks_python
    def load(self) -> Trained:
        """The network with its final weights. Raises `CheckpointError` if they are no longer in `out`."""
        checkpoints = layout.checkpoints_in(self.out / "checkpoints")
        final = next((path for path in reversed(checkpoints) if layout.step_of(path) == self.steps), None)
        if final is None:
            raise CheckpointError(f"the checkpoint of step {self.steps} is no longer in {self.out}")
        return _load(CheckpointFiles.of_run(final), self._model, "cpu")

    @cached_property
    def history(self) -> dict[str, NDArray[Any]]:
        """The run from its first step on, as arrays by name, see `history_of`. Raises `UsageError`."""
        return history_of(read_record(self.out))

    def plot(self) -> Report:
        """The run's report, with its curves, which a notebook shows. Raises `UsageError`."""
        return Report(render([read_record(self.out)]))

    @cached_property
    def model(self) -> nn.Module:
        """The network with its final weights, see `Trained.network`."""
        return self.load().network


@speaks_python
def train(
    recipe: str | Recipe = "default",
    *,
    model: str | Factory | None = None,
    loss: str | Loss | None = None,
    optimizer: str | MakeOptimizer | None = None,
    dataset: str | Path | Dataset | TorchData = "mnist",
    data: str | Path = "data",
    out: str | Path | None = None,
    nproc: int | None = None,
    resume: str | Path | None = None,
    verbose: bool = False,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> Result:
    """Train like `dmnist train`, but by default in this process and without output.

    - `recipe`: a recipe's name, a TOML file, a run's folder (its recipe), or a `Recipe`.
    - `model`: a model's name, `package.module:factory`, or the factory function itself.
    - `loss`: `cross-entropy`, `package.module:function`, or a function of logits `(n, classes)` and labels
      `(n,)` that returns the loss of each sample, `(n,)`.
    - `optimizer`: a name, `package.module:function`, or a function of a list of parameters and of `lr` that
      returns a torch optimizer, such as `torch.optim.NAdam`.
    - `dataset`: a name, a folder with four IDX files, a pair of torch Datasets, or a `from_arrays`.
    - `data`: the folder of named data sets. Missing files are downloaded into it.
    - `out`: the run's folder, by default a new one under `runs`.
    - `nproc`: above 1, start this many processes for the run.
    - `resume`: a checkpoint to resume from, or "auto" for the newest valid one in `out`.
    - `verbose`: print progress as the command does.
    - `on_event`: a function that is called in this process with each event of the run, a dictionary: the
      content of a line of `metrics.jsonl`, in order, once each. What it raises ends the run, after a
      checkpoint if there are several processes, and is raised here. Under a launcher rank 0 calls it.
    - `settings`: fields of `Recipe`, which override the recipe, and fields of `Run`.

    Under torchrun, srun or mpirun, every rank calls this once and gets the result. Raises subclasses of
    `DmnistError`, such as `UsageError` for invalid settings. Ctrl-C saves a checkpoint and raises
    `Interrupted`; a second one raises `KeyboardInterrupt` at once.
    """
    names, functions = names_and_functions(model=model, loss=loss, optimizer=optimizer)
    if on_event is not None and not callable(on_event):
        raise UsageError(f"on_event must be a function of an event, a dictionary, not {on_event!r:.80}")
    nproc = python_number(nproc)
    settings = {key: python_number(value) for key, value in settings.items()}
    if settings.get("init_from") is not None:
        settings["init_from"] = str(as_path("init_from", settings["init_from"]))
    settings |= {key: str(settings[key]) for key in _INTERVALS if isinstance(settings.get(key), int)}
    recipe, title = override_recipe(recipe, settings, names)
    given, dataset_name, folder = resolve_dataset(dataset, data)
    run_settings: dict[str, Any] = {key: value for key, value in settings.items() if key in RUN_FIELDS}
    run = Run(
        dataset=dataset_name,
        data=folder,
        out=None if out is None else as_path("out", out),
        resume=None if resume is None else str(as_path("resume", resume)),
        nproc=nproc,
        **run_settings,
    )
    console = console_for(verbose, in_notebook())

    def read(stopped: Callable[[], bool] = lambda: False) -> Dataset:
        return given or prefetch.read(run, console, stopped)

    placement = detect_launcher.detect()
    if placement is None and verbose and (note := detect_launcher.unused_nodes()):
        write_line(note)
    if placement is not None and nproc not in (None, placement.local_size):
        raise UsageError(
            f"nproc={nproc}, but {placement.launcher} started {placement.local_size} processes here: "
            "leave out nproc"
        )
    if placement is None and nproc not in (None, 1):
        result = train_in_processes(nproc, recipe, run, title, verbose, functions, read, on_event)
    else:
        with (
            defined_state(),
            registered(functions),
            StopOnInterrupt() as signals,
            _joined_group(placement or ALONE, recipe, run) as world,
        ):
            result = training.run(
                world, recipe, run, title=title, console=console, signals=signals, read=read,
                on_event=on_event,
            )  # fmt: skip
    return Result(
        accuracy=result["test_accuracy"],
        loss=result["test_loss"],
        out=Path(result["out"]),
        validation_accuracy=result.get("validation_accuracy"),
        best_step=result.get("best_step"),
        _model=model,
        **{key: result[key] for key in ("steps", "weights_sha256", "samples_sha256", "data_sha256")},
    )


@speaks_python
def load(
    path: str | Path, *, model: str | Factory | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """Load the network in a checkpoint or in a run's folder, ready to use on `device`.

    A run's folder stands for its last weights or, with `validation`, for those with the best validation
    accuracy. A checkpoint of your own model needs the `model` that you passed to `train`. Raises
    `CheckpointError`.
    """
    return _load(find_checkpoint(as_path("path", path)), model, device)


def _load(files: CheckpointFiles, model: str | Factory | None, device: torch.device | str) -> Trained:
    names, functions = names_and_functions(model=model)
    with defined_state(), registered(functions):
        return restore(files, model=names.get("model"), device=torch.device(device))


@speaks_python
def evaluate(
    what: str | Path | Result | Trained | nn.Module,
    dataset: str | Path | Dataset | TorchData | None = None,
    *,
    data: str | Path | None = None,
    model: str | Factory | None = None,
) -> Evaluation:
    """Evaluate a run, a checkpoint or a network on a data set's test images, in this process.

    `dataset` and `data` are as in `train`, and `dataset` may be one torch `Dataset` of test images. Their
    default is the data set that the network was trained on. A run's folder stands for the same weights as
    in `load`, a `Result` for the final weights. A bare torch module needs `dataset`, and its inputs are
    normalised with the data set's mean and standard deviation. Raises subclasses of `DmnistError`.
    """
    if isinstance(what, str | Path):
        what = load(what, model=model)
    elif isinstance(what, Result):
        what = what.load()
    network = what.network if isinstance(what, Trained) else what
    if not isinstance(network, nn.Module):
        raise UsageError(
            "evaluate takes a run's folder, a checkpoint, the result of train or load, or a torch module, "
            f"not {what!r:.80}"
        )
    if dataset is None and not isinstance(what, Trained):
        raise UsageError("a bare network does not know its data set: pass dataset")
    given, name, folder = None, None, None if data is None else as_path("data", data)
    if dataset is not None:
        given, name, folder = resolve_dataset(dataset, data or "data", test_only=isinstance(what, Trained))
    console = console_for(False)
    world = World(ALONE, next(network.parameters(), torch.empty(0)).device, "none")
    with defined_state():
        torch.set_num_threads(1)  # as in training with `tree`, so that the loss is bit-identical
        if isinstance(what, Trained):
            trained = what
            loaded = broadcast_dataset(world, lambda: given or load_dataset(trained, name, folder, console))
            same_data = dataset is None and data is None
            return evaluate_trained(trained, loaded, world, require_training_data=same_data)
        loaded = broadcast_dataset(
            world,
            lambda: given or prefetch.read(Run(dataset=name or "", data=folder or Path("data")), console),
        )
        return evaluate_network(network, loaded, world, "fp32")


@contextlib.contextmanager
def _joined_group(placement: Placement, recipe: Recipe, run: Run) -> Iterator[World]:
    """Join the process group, and leave it at the end."""
    if recipe.sync == "tree":
        environment.order_additions()
    device = choose_device(placement, run.device, shared=run.oversubscribe)
    job = describe_training("the library's train", recipe, run, one_host=placement.one_host)
    world = World.connect(
        placement, device=device, hang_after=run.hang_after, job=job, shared=run.oversubscribe
    )
    try:
        yield world
    except BaseException:
        world.leave()
        raise
    world.close()
