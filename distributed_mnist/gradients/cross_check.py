"""Check the gradients of a run, from time to time: between ranks, against autograd, and for hidden state.

At a check every rank computes two shards again: one of its own (now and then in the pass that it shares in
training) and one of the next rank's, in a pass of its own and on a fresh copy of the model. The digests of
a shard's two gradients must be equal (see `agreement`). The second gradient is also compared with that of
autograd, up to rounding.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..common.digest import digest
from ..common.generators import same_torch_state
from ..distributed.world import World
from ..errors import TrainingError
from .agreement import Disagreement, Results, compare
from .per_shard import HookedLayers
from .shard_gradients import ForwardShards, ShardGradients
from .tree_sum import owned_shards

_SHARED_PASS_EVERY = 8  # checks: a pass of several shards takes as long as a step
_SMALL = 0.1
"""A gradient smaller than this fraction of the largest may be a sum that cancels, such as that of a bias
before a normalisation. Rounding then decides all its digits."""
_WRONG = 4.0  # times the tolerance: a model that was right on its first batch is wrong beyond doubt


class CrossCheck:
    """Checks the gradients of `local`, a rank's model, whose name is `name`.

    `untouched` is a copy of the model with its initial weights, which never makes a pass; None if the model
    cannot be copied. `tolerance` is the largest difference from autograd's gradient, as a fraction of the
    largest gradient of the same parameter.
    """

    def __init__(
        self, world: World, shards: int, local: ShardGradients, untouched: nn.Module | None,
        name: str = "", tolerance: float = 1e-3,
    ) -> None:  # fmt: skip
        self._world, self._shards, self._local = world, shards, local
        self._untouched, self._name, self._tolerance = untouched, name, tolerance
        self._checks = 0

    def initial(self) -> ShardGradients | None:
        """Return the gradients of a copy of the model with its initial weights, or None."""
        return None if self._untouched is None else self._copy(self._untouched)

    def check(
        self,
        usual: Callable[[int], Tensor],
        forward_shards: ForwardShards,
        sizes: Sequence[int],
    ) -> None:
        """Compare gradients at the current weights. Every rank must call it.

        `usual(shard)` is the gradient of one of this rank's shards, computed as in training. `sizes` are
        those of all shards. No weight and no generator of torch changes. Raises `UsageError` if the model
        keeps state between passes, and `TrainingError` if a rank computes different gradients from the
        others or if the gradient is not autograd's.
        """
        world, local = self._world, self._local

        def in_its_own_pass(shard: int) -> Tensor:
            return local.of_shard(forward_shards, shard, sizes)

        with same_torch_state(world.device):
            own = self._shard_of(world.rank, sizes)
            other = self._shard_of((world.rank + 1) % world.size, sizes)
            own_gradient = usual if self._checks % _SHARED_PASS_EVERY == 0 else in_its_own_pass
            mine = digest(own_gradient(own))
            fresh = self._fresh()
            # Autograd comes first, so that the copy's pass is not the same in number as the model's own.
            expected = ShardGradients((fresh or local).model).of_shard(forward_shards, other, sizes)
            gradient = (fresh or local).of_shard(forward_shards, other, sizes)

            def repeat(owner: int) -> Results:
                shard = self._shard_of(owner, sizes)
                again = [digest(in_its_own_pass(shard)) for _ in range(2)]
                anew = self._fresh()
                return Results(
                    usual=[digest(own_gradient(shard))] if owner == world.rank else [],
                    alone=again,
                    fresh=[digest((anew or local).of_shard(forward_shards, shard, sizes))],
                )

            found = compare(world, mine, digest(gradient), repeat)
        close = self.is_close(gradient, expected, _WRONG)
        self._checks += 1
        if found is not None and not self._is_a_bad_copy(found):
            raise found.error(world, self._name, "gradients")
        if not all_true(world, close):
            raise TrainingError(
                f"--model {self._name}: its gradients are not those of autograd, because a class derived "
                f"from nn.Linear or nn.Conv2d computes something else for some images: derive it from "
                f"nn.Module"
            )

    def check_closely(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare gradients up to rounding, where ranks need not compute the same bits.

        Every rank must call it. No weight and no generator of torch changes. Raises `TrainingError`.
        """
        world = self._world
        if world.size == 1:
            return
        following, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        with same_torch_state(world.device):
            mine, expected = (
                self._local.of_shard(forward_shards, self._shard_of(rank, sizes), sizes)
                for rank in (world.rank, following)
            )
        theirs = torch.empty_like(mine)
        world.send_recv({before: mine}, {following: theirs})
        self._checks += 1
        close = torch.tensor([self.is_close(theirs, expected, _WRONG)], device=world.device)
        wrong = (~world.all_gather(close)).flatten().nonzero().flatten().tolist()
        if wrong:
            pairs = ", ".join(f"rank {rank} and rank {(rank + 1) % world.size}" for rank in wrong)
            raise TrainingError(
                f"--model {self._name}: {pairs} compute different gradients of the same images, far beyond "
                "rounding: one of these hosts computes wrongly, or the model keeps state between passes"
            )

    def is_close(self, gradient: Tensor, expected: Tensor, factor: float = 1.0) -> bool:
        """Return whether two rows `(length,)` have the same gradients, to `factor` times the tolerance."""
        tolerance = factor * self._tolerance
        lengths = [p.numel() for p in self._local.parameters]
        gradient, expected = gradient[: sum(lengths)], expected[: sum(lengths)]
        least = _SMALL * float(expected.abs().max())
        return all(
            float((part - right).abs().max()) <= tolerance * max(float(right.abs().max()), least)
            for part, right in zip(gradient.split(lengths), expected.split(lengths), strict=True)
            if right.isfinite().all()  # the loop reports the others
        )

    def _shard_of(self, rank: int, sizes: Sequence[int]) -> int:
        """Return the shard of a rank that is checked this time: each time another one with samples."""
        owned = owned_shards(rank, self._world.size, self._shards)
        shards = [s for s in owned if sizes[s]] or [s for s in range(self._shards) if sizes[s]]
        return shards[self._checks % len(shards)]

    def _fresh(self) -> ShardGradients | None:
        """Return the gradients of a copy of the model that has made no pass, with the current weights."""
        if self._untouched is None:
            return None
        fresh = self._copy(self._untouched)
        with torch.no_grad():
            for to, now in zip(_state(fresh.model), _state(self._local.model), strict=True):
                if not torch.equal(to, now):  # a buffer may be a view that cannot be written
                    to.copy_(now)
        return fresh

    def _copy(self, model: nn.Module) -> ShardGradients:
        model = copy.deepcopy(model)
        return ShardGradients(model, HookedLayers(model) if self._local.layers else None)

    def _is_a_bad_copy(self, found: Disagreement) -> bool:
        """Return whether a copy of this model is something else from the start, as with a closure.

        Before the first step no state can have built up. Then the copy is not used any more.
        """
        bad = found.kind == "copy" and self._checks == 1
        if bad:
            self._untouched = None
        return bad


def all_true(world: World, value: bool) -> bool:
    """Return whether a value is true on all ranks."""
    return bool(world.all_gather(torch.tensor([value], device=world.device)).all())


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
