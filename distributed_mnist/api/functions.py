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

import numpy as np
import torch
from torch import nn

from ..common import environment
from ..common.placement import ALONE, Placement
from ..common.process_state import defined_state
from ..common.suggest import did_you_mean
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
from ..inference.trained import Trained, find_checkpoint, restore
from ..reporting.console import in_notebook
from ..runs import layout
from ..runs.run_files import find_recipe
from ..training import run as training
from ..training.evaluate import Evaluation
from ..training.evaluate import evaluate as evaluate_network
from ..user_code.functions import registered
from .arguments import RECIPE_FIELDS, RUN_FIELDS, as_path, resolve_dataset, speaks_python
from .interrupts import StopOnInterrupt
from .multi_process import console_for, train_in_processes

Factory = Callable[[int], nn.Module]
"""Makes a model, given the number of classes."""
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns each sample's loss, `(n,)`, given float32 logits `(n, classes)` and int64 labels `(n,)`."""
MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer, given a list of parameters and `lr`."""
_INTERVALS = ("checkpoint_every", "eval_every")  # here they may also be integers, which count steps


@dataclass(frozen=True)
class Result:
    """The result of a training run."""

    accuracy: float
    """Fraction of the test images that the final weights classify correctly."""
    loss: float
    """Mean cross-entropy on the test images, in nats."""
    steps: int
    weights_sha256: str
    samples_sha256: str
    data_sha256: str
    out: Path
    """The run's folder."""
    _model: str | Factory | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return (
            f"<Result: {self.accuracy:.2%} of the test images, loss {self.loss:.4f}, {self.steps} steps, "
            f"weights {self.weights_sha256[:8]}…, in {self.out}>"
        )

    def load(self) -> Trained:
        """The network with its final weights. Raises `CheckpointError` if they are no longer in `out`."""
        checkpoints = layout.checkpoints_in(self.out / "checkpoints")
        final = next((path for path in reversed(checkpoints) if layout.step_of(path) == self.steps), None)
        if final is None:
            raise CheckpointError(f"the checkpoint of step {self.steps} is no longer in {self.out}")
        return load(final, model=self._model)

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
    dataset: str | Path | Dataset = "mnist",
    data: str | Path = "data",
    out: str | Path | None = None,
    nproc: int | None = None,
    resume: str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Result:
    """Train like `dmnist train`, but by default in this process and without output.

    - `recipe`: a recipe's name, a TOML file, a run's folder (its recipe), or a `Recipe`.
    - `model`: a model's name, `package.module:factory`, or the factory function itself.
    - `loss`: `cross-entropy`, `package.module:function`, or a function of logits `(n, classes)` and labels
      `(n,)` that returns the loss of each sample, `(n,)`.
    - `optimizer`: a name, `package.module:function`, or a function of a list of parameters and of `lr` that
      returns a torch optimizer, such as `torch.optim.NAdam`.
    - `dataset`: a name, a folder with four IDX files of your own, or the result of `from_arrays`.
    - `data`: the folder of named data sets. Missing files are downloaded into it.
    - `out`: the run's folder, by default a new one under `runs`.
    - `nproc`: above 1, start this many processes for the run.
    - `resume`: a checkpoint to resume from, or "auto" for the newest valid one in `out`.
    - `verbose`: print progress as the command does.
    - `settings`: fields of `Recipe`, which override the recipe, and fields of `Run`.

    Under torchrun, srun or mpirun, every rank calls this once and gets the result. Raises subclasses of
    `DmnistError`, such as `UsageError` for invalid settings. Ctrl-C saves a checkpoint and raises
    `Interrupted`; a second one raises `KeyboardInterrupt` at once.
    """
    names, functions = _names_and_functions(model=model, loss=loss, optimizer=optimizer)
    nproc = _python_number(nproc)
    settings = {key: _python_number(value) for key, value in settings.items()}
    recipe, title = _override_recipe(recipe, settings, names)
    given, dataset_name, folder = resolve_dataset(dataset, data)
    run_settings: dict[str, Any] = {
        key: str(value) if key in _INTERVALS and isinstance(value, int) else value
        for key, value in settings.items()
        if key in RUN_FIELDS
    }
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
        result = train_in_processes(nproc, recipe, run, title, verbose, functions, read)
    else:
        with (
            defined_state(),
            registered(functions),
            StopOnInterrupt() as signals,
            _joined_group(placement or ALONE, recipe, run) as world,
        ):
            result = training.run(
                world, recipe, run, title=title, console=console, signals=signals, read=read
            )
    return Result(
        accuracy=result["test_accuracy"],
        loss=result["test_loss"],
        out=Path(result["out"]),
        _model=model,
        **{key: result[key] for key in ("steps", "weights_sha256", "samples_sha256", "data_sha256")},
    )


@speaks_python
def load(
    path: str | Path, *, model: str | Factory | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """Load the network in a checkpoint, or the best one in a run's folder, ready to use on `device`.

    A checkpoint of your own model needs the `model` that you passed to `train`. Raises `CheckpointError`.
    """
    files = find_checkpoint(as_path("path", path))
    names, functions = _names_and_functions(model=model)
    with defined_state(), registered(functions):
        return restore(files, model=names.get("model"), device=torch.device(device))


@speaks_python
def evaluate(
    what: str | Path | Result | Trained | nn.Module,
    dataset: str | Path | Dataset | None = None,
    *,
    data: str | Path | None = None,
    model: str | Factory | None = None,
) -> Evaluation:
    """Evaluate a run, a checkpoint or a network on a data set's test images, in this process.

    `dataset` and `data` are as in `train`. Their default is the data set that the network was trained on. A
    run's folder stands for its best checkpoint, a `Result` for the final weights. A bare torch module needs
    `dataset`, and its inputs are normalised with the data set's mean and standard deviation. Raises
    subclasses of `DmnistError`.
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
        given, name, folder = resolve_dataset(dataset, data or "data")
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
    device = choose_device(placement, run.device)
    job = describe_training("the library's train", recipe, run, one_host=placement.one_host)
    world = World.connect(placement, device=device, hang_after=run.hang_after, job=job)
    try:
        yield world
    except BaseException:
        world.leave()
        raise
    world.close()


_ARGUMENTS = {
    "model": "a function of the number of classes",
    "loss": "a function of logits and labels",
    "optimizer": "a function of parameters and lr",
}
"""What may be a user's own function, and of what."""


def _names_and_functions(**given: Any) -> tuple[dict[str, str], dict[str, Callable[..., Any]]]:
    """The names of those of `_ARGUMENTS` that the user passed; and by name those that are functions."""
    names: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    for argument, value in given.items():
        if isinstance(value, str):
            names[argument] = value
        elif callable(value):
            name = getattr(value, "__qualname__", type(value).__qualname__)
            name = f"{getattr(value, '__module__', None) or '__main__'}:{name}"
            # Two may have the same name, such as `<lambda>`.
            names[argument] = name if functions.get(name, value) is value else f"{name}.{argument}"
            functions[names[argument]] = value
        elif value is not None:
            raise UsageError(f"{argument} must be a name or {_ARGUMENTS[argument]}, not {value!r:.80}")
    return names, functions


def _python_number(value: Any) -> Any:
    """Convert a NumPy number, as from a loop over `np.linspace`, to a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def _override_recipe(
    recipe: str | Recipe, settings: dict[str, Any], names: dict[str, str]
) -> tuple[Recipe, str]:
    """The recipe with the user's settings applied, and its name for display."""
    known = RECIPE_FIELDS | RUN_FIELDS
    for name in settings:
        if name not in known:
            raise UsageError(f"there is no setting {name!r}{did_you_mean(name, sorted(known))}")
    if not isinstance(recipe, str | Path | Recipe):
        raise UsageError(
            f"recipe must be a name, a TOML file, a run's folder or a Recipe, not {recipe!r:.80}"
        )
    title = "recipe" if isinstance(recipe, Recipe) else str(recipe)
    base = recipe if isinstance(recipe, Recipe) else find_recipe(str(as_path("recipe", title)), **names)
    changes = {key: value for key, value in settings.items() if key in RECIPE_FIELDS}
    return Recipe.from_dict(base.to_dict() | changes | names, "settings"), title
