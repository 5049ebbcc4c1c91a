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
        self._cross_check = CrossCheck(world, shards, ShardGradients(model), None, name, tolerance)
        self._world, self._image_shape = world, image_shape
        self._module: nn.Module = model
        self._overlapped = world.size > 1 and not captured
        if self._overlapped:
            self._module = _distributed(model, world)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sum = torch.zeros(0, device=world.device)
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
            with self._module.no_sync() if self._overlapped else nullcontext():  # type: ignore[operator]
                self._surrogate_loss(forward_shards, shards, sizes).backward()
        surrogate = self._surrogate_loss(forward_shards, last, sizes)
        if self._overlapped:
            with self._world.communicating("a gradient sum", also_computes=True):
                surrogate.backward()
        else:
            surrogate.backward()
        if self._world.size > 1 and not self._overlapped:
            self._sum = torch.cat([p.grad.flatten() for p in self._parameters if p.grad is not None])

    def exchange(self) -> None:
        """Add the gradients of all ranks, unless DDP has; see `Gradients`."""
        if not self._overlapped:
            self._world.all_reduce_sum_(self._sum)

    def set_gradients(self) -> None:
        """Copy the sum into every `grad`, if it is not there; see `Gradients`."""
        if self._world.size > 1 and not self._overlapped:
            sizes = [p.numel() for p in self._parameters]
            for p, total in zip(self._parameters, self._sum.split(sizes), strict=True):
                p.grad = total.view(p.shape)

    def can_be_captured(self) -> bool:
        """Return whether DDP does not communicate; see `Gradients`."""
        return not self._overlapped

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
        return (logits * (grad_logits * self._world.size if self._overlapped else grad_logits)).sum()

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
