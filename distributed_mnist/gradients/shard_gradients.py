"""Compute the gradients of shards on one model: by its layers where they can, otherwise by autograd."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..common.generators import DrawsNotShared
from ..models.running_statistics import RunningStatistics
from .per_shard import GradientViews, HookedLayers, backpropagate

ForwardShards = Callable[[nn.Module, range], tuple[Tensor, Tensor]]
"""`forward_shards(module, shards)` runs contiguous shards with at least one sample through `module`.

Returns the logits, and the gradient of the loss with respect to them. The loss is summed over the samples
and divided by the size of the global batch. A pass may be repeated; only its last result counts."""


class ShardGradients:
    """Computes one flat row per shard: the gradients of a model's trained parameters.

    Behind them are the changes of its running statistics, times the shard's share of the global batch. So
    their sum over all shards is the change of the step.

    With `layers`, the layers compute the gradients. Whether they can is decided anew in each pass, because
    what a model does may depend on its images. Without `layers`, or if they cannot, autograd does.
    """

    def __init__(self, model: nn.Module, layers: HookedLayers | None = None) -> None:
        self.model, self.layers = model, layers
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.statistics = RunningStatistics(model)
        self.gradients_length = sum(p.numel() for p in self.parameters)
        self.length = self.gradients_length + self.statistics.length

    def write(
        self,
        forward_shards: ForwardShards,
        shards: range,
        sizes: Sequence[int],
        rows: Tensor,
        views: Sequence[GradientViews] | None = None,
    ) -> bool:
        """Write the rows of consecutive shards, which share one pass, into `rows`.

        `sizes` are the sizes of all shards of the batch. `rows` is float32 `(shards, length)`, and `views`
        are its `HookedLayers.views`, if the caller keeps them. Returns False if the shards have to go
        through the model one by one. Without autograd (`torch.no_grad`) the gradients are zero.
        """
        count, sizes = sum(sizes), sizes[shards.start : shards.stop]
        if sum(sizes) == 0:  # a batch with fewer samples than shards
            rows.zero_()
            return True
        if not self.statistics.length:
            return self._write_pass(forward_shards, shards, sizes, rows, views)
        changes = rows[0, self.gradients_length :]
        with self.statistics.unchanged(sum(sizes) / count, changes):
            return self._write_pass(forward_shards, shards, sizes, rows, views)

    def _write_pass(
        self,
        forward_shards: ForwardShards,
        shards: range,
        sizes: Sequence[int],
        rows: Tensor,
        views: Sequence[GradientViews] | None,
    ) -> bool:
        """Make a pass over shards of these sizes and write their gradients; see `write`."""
        try:
            with self.layers.recording() if self.layers else nullcontext():
                logits, grad_logits = forward_shards(self.model, shards)
        except DrawsNotShared:
            return False
        if self.layers and self.layers.can_write(logits, sizes):
            views = self.layers.views(rows) if views is None else views
            self.layers.write_gradients(logits, grad_logits, sizes, views)
            return True
        if len(shards) > 1:
            return False
        rows.zero_()  # for parameters that are not used
        if not torch.is_grad_enabled():
            return True
        gradients = backpropagate(logits, self.parameters, grad_logits)
        parts = self.parameter_views(rows[0])
        used = [(part, g) for part, g in zip(parts, gradients, strict=True) if g is not None]
        if used:
            torch._foreach_copy_([part for part, _ in used], [g for _, g in used])
        return True

    def of_shard(self, forward_shards: ForwardShards, shard: int, sizes: Sequence[int]) -> Tensor:
        """Return the row of one shard in a pass of its own, `(length,)`.

        `sizes` are the sizes of all shards.
        """
        row = torch.empty((1, self.length), device=self.parameters[0].device)
        self.write(forward_shards, range(shard, shard + 1), sizes, row)
        return row[0]

    def parameter_views(self, flat: Tensor) -> list[Tensor]:
        """Cut a row's gradients into one view per parameter, with its shape and memory layout."""
        views, offset = [], 0
        for p in self.parameters:
            views.append(flat.as_strided(p.shape, p.stride(), flat.storage_offset() + offset))
            offset += p.numel()
        return views
