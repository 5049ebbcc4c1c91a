"""Sum the gradient of a global batch with DistributedDataParallel, for `--sync ddp`.

DDP and its all-reduce choose the order of the additions, so results are equal up to rounding.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ImageShape
from ..distributed.world import World
from .cross_check import CrossCheck
from .shard_gradients import ForwardShards, ShardGradients
from .tree_sum import owned_shards


class DdpGradients:
    """Sums gradients with DistributedDataParallel, the standard way. Results are equal up to rounding.

    A rank's shards go through the model together, up to `per_pass` of them in one pass. All passes but the
    last only accumulate gradients. DDP adds the gradients of some layers while those of others are
    computed. If the steps are `captured`, the ranks add all of them afterwards, because a graph cannot
    communicate through every backend. For `name` and `tolerance` see `CrossCheck`.
    """

    def __init__(
        self, model: nn.Module, world: World, shards: int, per_pass: int, image_shape: ImageShape,
        *, captured: bool = False, name: str = "", tolerance: float = 1e-3,
    ) -> None:  # fmt: skip
        local = ShardGradients(model)
        self._cross_check = CrossCheck(world, shards, local, None, name, tolerance)
        self._world, self._image_shape, self._parameters = world, image_shape, local.parameters
        self._has_ddp = world.size > 1 and not captured
        self._module = _distributed(model, world) if self._has_ddp else model
        # What the ranks add if there are several and no DDP.
        length = local.gradients_length if world.size > 1 and captured else 0
        self._sum = torch.zeros(length, device=world.device)
        self._views = local.parameter_views(self._sum) if length else []
        self._owned = owned_shards(world.rank, world.size, shards)
        self._per_pass = per_pass

    def part(self, sizes: Sequence[int]) -> range:
        """Return this rank's shards; see `Gradients`."""
        return self._owned

    def compute_part(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compute the gradient of this rank's shards, and with DDP that of the step; see `Gradients`."""
        for p in self._parameters:
            p.grad = None
        owned = self._owned
        *earlier, last = (owned[i : i + self._per_pass] for i in range(0, len(owned), self._per_pass))
        for shards in earlier:
            with self._module.no_sync() if self._has_ddp else nullcontext():  # type: ignore[operator]
                self._surrogate_loss(forward_shards, shards, sizes).backward()
        surrogate = self._surrogate_loss(forward_shards, last, sizes)
        summing = self._world.communicating("a gradient sum", also_computes=True)
        with summing if self._has_ddp else nullcontext():
            surrogate.backward()
        if self._views:
            torch._foreach_copy_(self._views, [p.grad for p in self._parameters if p.grad is not None])

    def exchange(self) -> None:
        """Add the gradients of all ranks, unless DDP has; see `Gradients`."""
        if self._views:
            self._world.all_reduce_sum_(self._sum)

    def set_gradients(self) -> None:
        """Let every `grad` be a view of the sum, unless DDP has set it; see `Gradients`."""
        if self._views:
            for p, view in zip(self._parameters, self._views, strict=True):
                p.grad = view

    def can_be_captured(self) -> bool:
        """Return whether there is no DDP; see `Gradients`."""
        return not self._has_ddp

    def recompute_statistics(self, batches: Iterable[tuple[ForwardShards, Sequence[int]]]) -> None:
        """Do nothing: models with running statistics are refused."""

    def prepare(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Do nothing: autograd computes these gradients."""

    def check(self, forward_shards: ForwardShards, sizes: Sequence[int]) -> None:
        """Compare gradients with other ranks, up to rounding; see `CrossCheck.check_closely`."""
        self._cross_check.check_closely(forward_shards, sizes)

    def _surrogate_loss(self, forward_shards: ForwardShards, shards: range, sizes: Sequence[int]) -> Tensor:
        """Return a scalar whose gradient is that of the loss; see `backpropagate`."""
        if sum(sizes[shards.start : shards.stop]) == 0:
            return self._zero_loss()
        logits, grad_logits = forward_shards(self._module, shards)
        # DDP divides by the number of processes; ours is already a share of the global gradient.
        return (logits * (grad_logits * self._world.size if self._has_ddp else grad_logits)).sum()

    def _zero_loss(self) -> Tensor:
        """Return a zero that depends on every parameter: DDP waits for the gradients of all of them."""
        return self._module(torch.zeros((1, *self._image_shape), device=self._world.device)).sum() * 0


def _distributed(model: nn.Module, world: World) -> DistributedDataParallel:
    world.join_process_group()
    on_cpu = world.device.type == "cpu"
    # It imports torch's compiler, which takes seconds and is not a hang.
    with world.status.during("setting up DDP", 120.0), world.communicating("a first gradient sum"):
        module = DistributedDataParallel(
            model, device_ids=None if on_cpu else [world.device], gradient_as_bucket_view=True
        )
    if on_cpu:
        # gloo's thread would compete for a core, see `socket_collectives`. A lambda, because torch accepts
        # only its own type annotations on a hook.
        module.register_comm_hook(None, lambda _, bucket: _mean_over(world, bucket))
    return module


def _mean_over(world: World, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks, as DDP's all-reduce does. `bucket` is torch's `GradBucket`."""
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(world.all_reduce_sum_(bucket.buffer().div_(world.size)))
    return mean
