"""Sum the gradient of a global batch as integers, for `--precision exact`.

The order of additions does not matter (`exact`), so the batch may be cut anywhere. Each rank takes a
contiguous part of it, in passes of any size, and a plain all-reduce adds the integers.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ...common.digest import digest
from ...distributed.world import World
from ...errors import CheckpointError
from ...exact.module import ExactModule
from ...exact.passes.training_pass import TrainingPass
from ...exact.refusal import Refused
from ...exact.scales import Scales
from ..agreement import Results, compare
from ..shard_gradients import ForwardShards
from .parts import Parts
from .trial import refusal, require_exact_batch

_FIRST_SAMPLES = 128
"""With these samples of a batch, every rank finds the scales that are not known yet."""
_CHECKED_SAMPLES = 16
_LEAST_PER_PASS, _MOST_PER_PASS = 256, 4096  # samples
_ELEMENTS_PER_PASS = 2**22
"""On a CPU, how many numbers become integers in a pass, if it has more samples than the least.

A small pass costs more time than it computes, and a large one more memory than the caches have."""


class ExactGradients:
    """Sums gradients with the same bits on every machine, however the batch is cut; see `Gradients`.

    Here every sample is a shard. `scales` are a part of the run's state. `parts` are the ranks' parts of a
    batch, by default even ones. `per_pass` is the most samples in a pass, by default as many as the device
    computes fastest. A pass that finds scales always has the same samples. `name` is the model's.
    `pass_` is by default a `TrainingPass` of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        scales: Scales,
        parts: Parts | None = None,
        *,
        per_pass: int | None = None,
        name: str = "",
        pass_: TrainingPass | None = None,
    ) -> None:
        self._world, self._scales, self._name = world, scales, name
        self._parts = parts or Parts(world.size)
        self._pass = pass_ or TrainingPass(model, scales)
        self._module = ExactModule(model, self._pass)
        self._per_pass = per_pass or _MOST_PER_PASS
        self._checks = 0

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Make a first pass, which finds the sums; see `Gradients`. Raises `UsageError` for some models."""
        known = self._scales.before.clone()
        self._find_scales(forward_shards, sizes)
        if len(known) not in (0, self._pass.tensors):
            raise CheckpointError(
                f"the checkpoint has scales for {len(known)} tensors, but --model {self._name} now has "
                f"{self._pass.tensors}: its code has changed since then"
            )
        require_exact_batch(self._pass, min(_FIRST_SAMPLES, len(sizes)), len(sizes))
        if self._world.device.type == "cpu":
            fitting = _ELEMENTS_PER_PASS * min(_FIRST_SAMPLES, len(sizes)) // max(1, self._pass.elements)
            self._per_pass = min(max(fitting, _LEAST_PER_PASS), self._per_pass)
        self._pass.end_first_pass()
        # A run that is resumed must find the scales that are missing in the step that finds them otherwise.
        before = torch.zeros_like(self._scales.before)
        before[: len(known)] = known
        self._scales.restore(before)

    def part(self, sizes: Sequence[int]) -> range:
        """Return this rank's samples; see `Gradients`."""
        return self._parts.of(self._world.rank, len(sizes))

    def compute_part(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the sums over this rank's samples; see `Gradients`."""
        self.add_part(forward_shards, sizes, self.part(sizes))

    def can_be_captured(self) -> bool:
        """Return whether all tensors have scales; see `Gradients`."""
        return self._scales.complete()

    def exchange(self) -> None:
        """Add the sums of all ranks; see `Gradients`."""
        self._world.all_reduce_sum_(self._pass.sums.flat)
        self._scales.now.nan_to_num_(math.inf, math.inf)  # a maximum of what is not a number is not defined
        self._world.all_reduce_max_(self._scales.now)

    def add_part(self, forward_shards: ForwardShards, sizes: Sequence[int], samples: range) -> None:
        """Begin a step, and compute the sums over these samples of its batch: one rank's part."""
        if not self._scales.complete():
            self._find_scales(forward_shards, sizes)
        self._pass.begin_step()
        self._run(forward_shards, samples)

    def set_gradients(self) -> None:
        """Set each parameter's gradient from the sums over the whole batch, and end the step."""
        for parameter, gradient in zip(self._pass.parameters, self._pass.gradients(), strict=True):
            parameter.grad = gradient
        self._scales.end_step()

    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Do nothing: layers with running statistics are refused."""

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare the sums over a few samples between ranks; see `Gradients`. Raises `TrainingError`."""
        count, known = len(sizes), self._scales.before.clone()
        complete = self._scales.complete()
        if not complete:  # as before the first step: without scales all values would saturate
            self._find_scales(forward_shards, sizes)

        def sums_over_part_of(rank: int) -> str:
            start = (rank * count // self._world.size + self._checks * _CHECKED_SAMPLES) % count
            self._pass.begin_step()
            self._run(forward_shards, range(start, min(start + _CHECKED_SAMPLES, count)))
            return digest(self._pass.sums.flat)

        def repeat(rank: int) -> Results:
            again = [sums_over_part_of(rank) for _ in range(2)]
            return Results(usual=again[:1], alone=again, fresh=again[:1])

        own = sums_over_part_of(self._world.rank)
        next_one = sums_over_part_of((self._world.rank + 1) % self._world.size)
        found = compare(self._world, own, next_one, repeat)
        self._checks += 1
        if not complete:
            self._scales.restore(known)  # see `prepare`
        if found is not None:
            raise found.error(self._world, self._name, "gradients")

    def _find_scales(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Give a scale to tensors that have none. Every rank uses the same samples, and finds the same."""
        self._pass.begin_step()
        self._run(forward_shards, range(min(_FIRST_SAMPLES, len(sizes))), starting=True)

    def _run(self, forward_shards: ForwardShards, samples: range, *, starting: bool = False) -> None:
        """Add the sums over these samples of the batch."""
        per_pass = len(samples) if starting else self._per_pass
        for start in range(samples.start, samples.stop, per_pass or 1):
            self._pass.begin_pass(starting=starting)
            part = range(start, min(start + per_pass, samples.stop))
            try:
                logits, gradient = forward_shards(self._module, part)
                (logits * gradient).sum().backward()  # see `per_shard.backpropagate`
                self._pass.end_pass()
            except Refused as error:  # for these images only
                refused = refusal(error, self._module.model, self._name)
                refused.on_one_rank = True
                raise refused from error
