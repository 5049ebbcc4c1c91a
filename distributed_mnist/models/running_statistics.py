"""The norm layers of torch that take statistics over a batch, and their running statistics.

Training runs one shard per pass through a model with such layers, so the statistics are those of a shard.
Which images are in a shard does not depend on the number of processes. A pass must not change the running
statistics by itself, because a process would then use what its own earlier passes left. So each pass, with
its backward pass, starts from the values at the beginning of the step, and its changes are taken out again.
A step adds the mean of all shards' changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def statistics_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the layers that use batch statistics or update running ones in their present mode.

    These are torch's batch norms in training, batch norms without running statistics in any mode, and
    instance norms that update running statistics.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and (isinstance(module, _BatchNorm) if module.running_mean is None else module.training)
    }


@contextmanager
def neutralised(model: nn.Module) -> Iterator[None]:
    """Let these layers normalise with fixed statistics, in which no image depends on another."""
    layers: list[Any] = list(statistics_layers(model).values())
    before = [(layer.training, layer.running_mean, layer.running_var) for layer in layers]
    device = next(model.parameters()).device
    try:
        for layer in layers:
            layer.training = False
            if layer.running_mean is None:
                layer.running_mean = torch.zeros(layer.num_features, device=device)
                layer.running_var = torch.ones(layer.num_features, device=device)
        yield
    finally:
        for layer, (training, mean, variance) in zip(layers, before, strict=True):
            layer.training, layer.running_mean, layer.running_var = training, mean, variance


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return, by name, the buffers that passes through a model in its present mode change."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, layer in statistics_layers(model).items()
        for key, buffer in layer.named_buffers(recurse=False)
        if key in _BUFFERS
    }


class RunningStatistics:
    """The running statistics that passes through a model in its present mode would change."""

    def __init__(self, model: nn.Module) -> None:
        self._batch_norms = [m for m in statistics_layers(model).values() if isinstance(m, _BatchNorm)]
        self._buffers = list(running_statistics(model).values())
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self.length = sum(self._sizes)
        """How many numbers they are."""

    @contextmanager
    def unchanged(self, share: float = 0.0, changes: Tensor | None = None) -> Iterator[None]:
        """Undo what passes inside this context change.

        Writes the changes, times `share`, into `changes`, float32 `(length,)`.
        """
        before = [buffer.clone() for buffer in self._buffers]
        try:
            yield
            if changes is not None:
                for part, buffer, old in zip(self._parts(changes), self._buffers, before, strict=True):
                    part.copy_((buffer - old) * share)
        finally:
            for buffer, old in zip(self._buffers, before, strict=True):
                buffer.copy_(old)

    def add(self, changes: Tensor) -> None:
        """Add changes `(length,)`, rounded to whole numbers for counts of batches."""
        if not self.length:
            return
        for part, buffer in zip(self._parts(changes), self._buffers, strict=True):
            buffer.add_(part if buffer.is_floating_point() else part.round().to(buffer.dtype))

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Forget the batch norms' running statistics; inside, they become the plain mean over all steps."""
        momenta = [layer.momentum for layer in self._batch_norms]
        try:
            for layer in self._batch_norms:
                layer.reset_running_stats()
                layer.momentum = None
            yield
        finally:
            for layer, momentum in zip(self._batch_norms, momenta, strict=True):
                layer.momentum = momentum

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [part.view(buffer.shape) for part, buffer in zip(parts, self._buffers, strict=True)]
