"""Sum the gradient of a global batch in one fixed tree, for `--sync tree`.

The gradients of the `V` shards are always added in the same binary tree, regardless of the ranks that
computed them. So the sum has the same bits for every number of processes.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..common.generators import same_torch_state
from ..distributed.world import World
from .cross_check import CrossCheck, all_true
from .interface import compute_gradients
from .per_shard import GradientViews, HookedLayers
from .shard_gradients import ForwardShards, ShardGradients
from .subtree_exchange import SubtreeExchange
from .tree_sum import BinaryCounter, owned_shards


class TreeGradients:
    """Sums gradients with the same bits for every number of processes from 1 to the number of shards.

    Each shard has its own gradient. A rank adds the complete subtrees among its shards, the ranks exchange
    the roots of these subtrees, and every rank finishes the same tree.

    If the model is supported, `layers` compute its gradients. Without `layers`, autograd does, with one
    shard per pass. With `layers`, consecutive shards whose sizes are in `invariant_sizes` go through the
    model in one pass. Each shard's gradient then has the same bits as in a pass of its own (see
    `batch_invariance`). For the other arguments see `CrossCheck`.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shards: int,
        layers: HookedLayers | None = None,
        invariant_sizes: Collection[Sequence[int]] = (),
        *,
        untouched: nn.Module | None = None,
        name: str = "",
        tolerance: float = 1e-3,
    ) -> None:
        self._world, self._local = world, ShardGradients(model, layers)
        self._cross_check = CrossCheck(world, shards, self._local, untouched, name, tolerance)
        self._invariant_sizes = {tuple(sizes) for sizes in invariant_sizes}
        self._counter = BinaryCounter()
        self._owned = owned_shards(world.rank, world.size, shards)
        self._gradient = torch.zeros(self._local.length, device=world.device)
        self._rows = torch.zeros((len(self._owned), self._local.length), device=world.device)
        self._layer_views: dict[range, list[GradientViews]] = {}
        self._exchange = SubtreeExchange(world, shards, self._local.length)
        views = self._local.parameter_views(self._gradient)
        for p, view in zip(self._local.parameters, views, strict=True):
            p.grad = view

    def part(self, sizes: Sequence[int]) -> range:
        """Return this rank's shards; see `Gradients`."""
        return self._owned

    def compute_part(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Add the gradients of this rank's shards, as far as one rank can; see `Gradients`."""
        self._counter = BinaryCounter()
        for shards, rows in self._rows_of_passes(forward_shards, sizes):
            self._counter.push_rows(shards.start, rows)

    def exchange(self) -> None:
        """Finish the tree; see `Gradients`."""
        self._gradient.copy_(self._exchange.all_reduce(self._counter))

    def set_gradients(self) -> None:
        """Change the running statistics; see `Gradients`. Every `grad` is a view of the sum."""
        self._local.statistics.add(self._gradient[self._local.gradients_length :])

    def can_be_captured(self) -> bool:
        """Return True: the trial before the first step has decided what to compute; see `Gradients`."""
        return True

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Replace the batch norms' running statistics; see `Gradients`. Their gradients become zero."""
        if self._local.statistics.length:
            with self._local.statistics.recomputed():
                for forward_shards, sizes in batches:
                    compute_gradients(self, forward_shards, sizes)

    def _rows_of_passes(
        self, forward_shards: ForwardShards, sizes: Sequence[int]
    ) -> Iterator[tuple[range, Tensor]]:
        """Yield the shards of each pass of this rank, in order, and their gradients, one row each."""
        start = self._owned.start
        while start < self._owned.stop:
            shards = self._shards_of_next_pass(sizes, start)
            rows = self._gradients_of_pass(forward_shards, sizes, shards)
            if rows is not None:
                yield shards, rows
                start = shards.stop

    def _gradients_of_pass(
        self, forward_shards: ForwardShards, sizes: Sequence[int], shards: range
    ) -> Tensor | None:
        """Return the gradients of shards that share a pass, one row each. They are overwritten later.

        Returns None if they cannot share one. From then on each shard has a pass of its own.
        """
        rows = self._rows[shards.start - self._owned.start : shards.stop - self._owned.start]
        if self._local.layers and shards not in self._layer_views:
            self._layer_views[shards] = self._local.layers.views(rows)
        views = self._layer_views.get(shards)
        if self._local.write(forward_shards, shards, sizes, rows, views):
            return rows
        self._invariant_sizes.clear()
        return None

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Try the layers' gradients on the run's first batch with its initial weights; see `Gradients`.

        A trial on noise is not enough, because what a model does may depend on its images. If the gradient
        of some shard is not autograd's, autograd computes them all, on every rank.
        """
        initial, close = self._cross_check.initial(), True
        if self._local.layers is not None and initial is not None:
            with same_torch_state(self._world.device):
                close = self._layers_are_right(initial, forward_shards, sizes)
        if not all_true(self._world, close):
            self._local.layers = None
            self._invariant_sizes.clear()

    def _layers_are_right(
        self, initial: ShardGradients, forward_shards: ForwardShards, sizes: Sequence[int]
    ) -> bool:
        """Compare the gradients of this rank's shards with autograd's.

        Shards that share a pass are compared with the same ones alone. If they differ, each shard has a
        pass of its own from now on.
        """
        by_layers = {shard: initial.of_shard(forward_shards, shard, sizes) for shard in self._owned}
        for shards in self._passes(sizes):
            rows = torch.empty((len(shards), initial.length), device=self._world.device)
            alone = torch.stack([by_layers[shard] for shard in shards])
            written = initial.write(forward_shards, shards, sizes, rows)
            if not (written and torch.equal(rows, alone)):
                self._invariant_sizes.clear()
        autograd = ShardGradients(initial.model)
        return all(
            self._cross_check.is_close(row, autograd.of_shard(forward_shards, shard, sizes))
            for shard, row in by_layers.items()
        )

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare gradients with other ranks and with autograd; see `CrossCheck.check`."""

        def usual(shard: int) -> Tensor:
            for shards in self._passes(sizes):
                if shard in shards:
                    rows = self._gradients_of_pass(forward_shards, sizes, shards)
                    if rows is not None:
                        return rows[shard - shards.start]
            return self._local.of_shard(forward_shards, shard, sizes)

        self._cross_check.check(usual, forward_shards, sizes)

    def _passes(self, sizes: Sequence[int]) -> list[range]:
        passes: list[range] = []
        while (start := passes[-1].stop if passes else self._owned.start) < self._owned.stop:
            passes.append(self._shards_of_next_pass(sizes, start))
        return passes

    def _shards_of_next_pass(self, sizes: Sequence[int], start: int) -> range:
        """Return the longest run of shards from `start` that can go through the model in one pass."""
        stops = range(self._owned.stop, start + 1, -1)
        invariant = (stop for stop in stops if tuple(sizes[start:stop]) in self._invariant_sizes)
        return range(start, next(invariant, start + 1))
