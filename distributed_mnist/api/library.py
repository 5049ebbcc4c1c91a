"""The program from Python: `train`, `evaluate` and `load`, which raise what the command would print.

They are the command's own parts, so a run has the same weights either way. Settings of torch that a run
needs are put back when it ends.
"""

import contextlib
import dataclasses
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
from ..common.suggest import did_you_mean
from ..config import Recipe, Run, load_recipe
from ..data import prefetch
from ..data.broadcast import broadcast_dataset
from ..data.catalog import NAMES, require_name
from ..data.datasets import Dataset
from ..distributed import detect_launcher
from ..distributed.devices import choose_device
from ..distributed.world import World
from ..errors import CheckpointError, UsageError
from ..inference import score as assess
from ..inference import trained
from ..inference.trained import Trained
from ..models.zoo import temporary_model
from ..runs import layout
from ..training import run as job
from ..training.evaluate import Evaluation
from ..training.evaluate import evaluate as score
from .multi_process import console_for, in_processes

Factory = Callable[[int], nn.Module]
"""Makes a model for so many classes."""
_RUN_FIELDS = {each.name for each in dataclasses.fields(Run)}
_INTERVALS = ("checkpoint_every", "eval_every")  # steps are numbers here
_RECIPE_FIELDS = {each.name for each in dataclasses.fields(Recipe)}


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    accuracy: float
    """Fraction of the test images that the final weights get right."""
    loss: float
    """Mean cross-entropy of the test images, in nats."""
    steps: int
    weights_sha256: str
    samples_sha256: str
    data_sha256: str
    out: Path
    """The run's folder."""
    _model: str | Factory | None = field(default=None, repr=False, compare=False)

    def load(self) -> Trained:
        """The network with its final weights. Raises `CheckpointError` if they are no longer in `out`."""
        kept = layout.checkpoints_in(self.out / "checkpoints")
        found = next((path for path in reversed(kept) if layout.step_of(path) == self.steps), None)
        if found is None:
            raise CheckpointError(f"the checkpoint of step {self.steps} is no longer in {self.out}")
        return load(found, model=self._model)

    @cached_property
    def model(self) -> nn.Module:
        """The network with its final weights: see `Trained.network`."""
        return self.load().network


def train(
    recipe: str | Recipe = "default",
    *,
    model: str | Factory | None = None,
    dataset: str | Path | Dataset = "mnist",
    data: str | Path = "data",
    out: str | Path | None = None,
    nproc: int | None = None,
    resume: str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Result:
    """`dmnist train`: by default in this process, without a word.

    `recipe` is a recipe's name, a TOML file or a `Recipe`; `settings` are the fields of `Recipe`, which
    override it, and those of `Run`. `model` is a model's name, `package.module:factory`, or such a function
    itself. `dataset` is a name, a folder with four IDX files of your own, or what `from_arrays` returns;
    `data` is the folder where named ones are, or are downloaded to. `out` is the run's folder, by default
    a new one under `runs`. With `nproc` above 1 so many processes are started, and ended. Under torchrun,
    srun or mpirun all ranks call this, once, and each gets the result.

    Raises subclasses of `DmnistError`: `UsageError` for settings that cannot be used, and so on.
    """
    name, factory = _named(model)
    nproc, settings = _plain(nproc), {key: _plain(value) for key, value in settings.items()}
    chosen, title = _recipe(recipe, settings, name)
    given, dataset_name, folder = _dataset(dataset, data)
    carried_out: dict[str, Any] = {
        key: str(value) if key in _INTERVALS and isinstance(value, int) else value
        for key, value in settings.items()
        if key in _RUN_FIELDS
    }
    run = Run(
        dataset=dataset_name,
        data=folder,
        out=Path(out) if out is not None else None,
        resume=None if resume is None else str(resume),
        nproc=nproc,
        **carried_out,
    )
    console = console_for(verbose)

    def read(stopped: Callable[[], bool] = lambda: False) -> Dataset:
        return given or prefetch.read(run, console, stopped)

    placement = detect_launcher.detect()
    if placement is not None and nproc not in (None, placement.local_size):
        raise UsageError(f"nproc={nproc}, but {placement.launcher} started this process: leave it away")
    if placement is None and nproc not in (None, 1):
        result = in_processes(nproc, chosen, run, title, verbose, factory, read)
    else:
        with (
            _factory_known(name, factory),
            _joined(placement or ALONE, run, chosen.sync == "tree") as world,
        ):
            result = job.run(
                world, chosen, run, title=title, console=console, signals=_NoSignals(), read=read
            )
    return Result(
        accuracy=result["test_accuracy"],
        loss=result["test_loss"],
        out=Path(result["out"]),
        _model=factory or name,
        **{key: result[key] for key in ("steps", "weights_sha256", "samples_sha256", "data_sha256")},
    )


def load(
    path: str | Path, *, model: str | Factory | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """The network in a checkpoint, or the best one in a run's folder, ready to use on `device`.

    A checkpoint of a model of your own needs `model`, as `train` was given it. Raises `CheckpointError`.
    """
    found = trained.find(Path(path))
    name, factory = _named(model)
    with _factory_known(name, factory), torch.random.fork_rng():
        return trained.restore(found, model=name, device=torch.device(device))


def evaluate(
    what: str | Path | Result | Trained | nn.Module,
    dataset: str | Path | Dataset | None = None,
    *,
    data: str | Path | None = None,
    model: str | Factory | None = None,
) -> Evaluation:
    """Score a run, a checkpoint or a network on a data set's test images, in this process.

    For `dataset` and `data` see `train`; without them, what it was trained on. A run's folder stands for
    its best checkpoint, a `Result` for the final weights. A bare torch module is given images
    normalised by the data set's mean and deviation, and needs `dataset`. Raises `DmnistError`s.
    """
    if isinstance(what, str | Path):
        what = load(what, model=model)
    elif isinstance(what, Result):
        what = what.load()
    network = what.network if isinstance(what, Trained) else what
    if dataset is None and not isinstance(what, Trained):
        raise UsageError("a bare network does not know its data set: give dataset")
    given, name, folder = None, None, None if data is None else Path(data)
    if dataset is not None:
        given, name, folder = _dataset(dataset, data or "data")
    console = console_for(False)
    world = World(ALONE, next(network.parameters()).device, "none")
    with _settings_kept():
        torch.set_num_threads(1)  # as in training with `tree`: the loss comes out the same to the bit
        if isinstance(what, Trained):
            trained = what
            held = broadcast_dataset(world, lambda: given or assess.read(trained, name, folder, console))
            return assess.score(trained, held, world, its_own=dataset is None and data is None)
        held = broadcast_dataset(
            world,
            lambda: given or prefetch.read(Run(dataset=name or "", data=folder or Path("data")), console),
        )
        classes, scale = len(held.class_names), {"mean": held.mean, "std": held.std}
        return score(network, held.test, world, classes=classes, precision="fp32", **scale)


class _NoSignals:
    """Of a run in somebody's own process, whose signals are not ours: Ctrl-C is a `KeyboardInterrupt`."""

    def arm(self, resume_flags: str = "") -> None:
        """Nothing."""

    def requested(self) -> bool:
        """Never."""
        return False


@contextlib.contextmanager
def _joined(placement: Placement, run: Run, exact: bool) -> Iterator[World]:
    """This process's place in its group, for as long as it takes."""
    if exact:
        environment.order_additions()
    device = torch.device("cpu") if run.device == "cpu" else choose_device(placement)
    with _settings_kept():
        world = World.connect(placement, device=device, hang_after=run.hang_after)
        try:
            yield world
        except BaseException:
            world.leave()
            raise
        world.close()


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """What a run sets in torch is put back: threads, determinism, the state of random numbers."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def _named(model: str | Factory | None) -> tuple[str | None, Factory | None]:
    """A model's name, and the function where one was given."""
    if model is None or isinstance(model, str):
        return model, None
    if not callable(model):
        raise UsageError(f"model must be a name or a function of the number of classes, not {model!r}")
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return f"{getattr(model, '__module__', None) or '__main__'}:{name}", model


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy's, as loops over settings have them."""
    return value.item() if isinstance(value, np.generic) else value


def _factory_known(name: str | None, factory: Factory | None) -> contextlib.AbstractContextManager[None]:
    return temporary_model(name, factory) if name and factory else contextlib.nullcontext()


def _recipe(recipe: str | Recipe, settings: dict[str, Any], model: str | None) -> tuple[Recipe, str]:
    """The recipe with what overrides it, and its name for people."""
    known = _RECIPE_FIELDS | _RUN_FIELDS
    for name in settings:
        if name not in known:
            raise UsageError(f"there is no setting {name!r}{did_you_mean(name, sorted(known))}")
    base, title = (
        (recipe, "recipe") if isinstance(recipe, Recipe) else (load_recipe(str(recipe)), str(recipe))
    )
    changes = {key: value for key, value in settings.items() if key in _RECIPE_FIELDS}
    changes |= {} if model is None else {"model": model}
    return Recipe.from_dict(base.to_dict() | changes, "settings"), title


def _dataset(dataset: str | Path | Dataset, data: str | Path) -> tuple[Dataset | None, str, Path]:
    """The data set if it was given whole; else its name, and the folder to look for it in."""
    if isinstance(dataset, Dataset):
        return dataset, "idx", Path(data)
    if isinstance(dataset, str) and (dataset in NAMES or not Path(dataset).is_dir()):
        require_name(dataset)
        return None, dataset, Path(data)
    return None, "idx", Path(dataset)
