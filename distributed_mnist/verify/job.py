"""The fixed training job, step by step, so that each step can be checked and repeated on any rank."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..common.digest import digest
from ..common.placement import ALONE
from ..config import Recipe, Run, load_recipe
from ..data import prefetch
from ..distributed.world import World
from ..gradients.exact.integer_sum import ExactGradients
from ..optim.schedule import make_schedule, set_learning_rate
from ..reporting.events import NullSink
from ..runs.checkpoint_store import NullStore
from ..training.forward import make_forward
from ..training.preparation import make_state, prepare
from ..training.state import TrainingContext
from ..training.sync_points import PhaseTimer
from .traced_pass import DIGITS, Trace, TracedPass

Combine = Callable[..., Tensor]
"""`combine(first, second, out=first)`"""

RECIPE_FILE = Path(__file__).with_name("job.toml")
# The batch size does not divide the training images, so the last batch of an epoch is short.
DATA = {"dataset": "generated", "train_size": 1200, "test_size": 100, "data_seed": 0}


def recipe() -> Recipe:
    """Return the job's recipe."""
    return load_recipe(str(RECIPE_FILE))


class ExactJob:
    """The job on this rank. `restart` begins it; each step is `add_part`, then `finish`."""

    def __init__(self, device: torch.device) -> None:
        self._world = World(ALONE, device, "none")
        options = Run(**DATA)
        read = partial(prefetch.read, options, Console(quiet=True))
        self._prepared = prepare(self._world, recipe(), options, "verify", read)
        self.data_sha256 = self._prepared.data.sha256
        self.steps = self._prepared.batches.total_steps
        self._lr_at = make_schedule(recipe(), self._prepared.batches.steps_per_epoch)
        self.restart()

    def restart(self) -> None:
        """Begin again, with new initial weights."""
        prepared = self._prepared
        self.state, _ = make_state(self._world, prepared.recipe, prepared.data)
        self.model, scales = self.state.model.train(), self.state.scales
        assert scales is not None
        self.scales, self.pass_ = scales, TracedPass(self.model, scales)
        self._gradients = ExactGradients(self.model, self._world, scales, pass_=self.pass_)
        self._context = TrainingContext(
            recipe=prepared.recipe,
            options=prepared.options,
            world=self._world,
            data=prepared.data,
            batches=prepared.batches,
            gradients=self._gradients,
            parts=None,
            loss=prepared.loss,
            draws=None,
            store=NullStore(),
            sink=NullSink(),
            stop_requested=lambda: False,
            save_every=None,
            eval_every=self.steps,
        )
        self._gradients.prepare(self._forward(0), prepared.batches.shard_sizes(0))
        self.keep()

    def add_part(self, step: int, index: int, count: int) -> None:
        """Compute part `index` of `count` of a step's batch. `results` are then those of this part."""
        sizes = self._prepared.batches.shard_sizes(step)
        samples = range(index * len(sizes) // count, (index + 1) * len(sizes) // count)
        self._gradients.add_part(self._forward(step), sizes, samples)

    def results(self) -> list[tuple[Tensor, Combine]]:
        """Return what `add_part` has computed, and how parts are combined, in place."""
        return [
            (self.pass_.sums.flat, torch.add),
            (self.pass_.checksums, torch.add),
            (self.scales.now, torch.maximum),
        ]

    def trace(self) -> Trace:
        """Return digests of `results`."""
        return self.pass_.trace()

    def finish(self, step: int) -> None:
        """Take the optimizer's step, with the results of all parts."""
        self._gradients.set_gradients()
        set_learning_rate(self.state.optimizer, self._lr_at(step))
        self.state.optimizer.step()

    def keep(self) -> None:
        """Remember the weights and the scales, which are right."""
        self._kept = [value.clone() for value in self.weights()], self.scales.before.clone()

    def take_back(self) -> None:
        """Return to what was kept."""
        weights, scales = self._kept
        for value, kept in zip(self.weights(), weights, strict=True):
            value.copy_(kept)
        self.scales.restore(scales)

    def weights(self) -> Sequence[Tensor]:
        """Return the parameters' values, which can be changed."""
        return [parameter.detach() for parameter in self.model.parameters()]

    def weights_trace(self) -> Trace:
        """Return a short digest of each parameter."""
        return {name: digest(value)[:DIGITS] for name, value in self.model.state_dict().items()}

    def weights_sha256(self) -> str:
        """Return what `dmnist train` calls `weights sha256`."""
        return digest(dict(self.model.state_dict()))

    def _forward(self, step: int):  # type: ignore[no-untyped-def]
        return make_forward(self._context, PhaseTimer(self._world), step)
