"""Compute a gradient for each of several shards that go through a model in one pass.

A pass over one small shard spends much of its time on fixed costs: casts, memory layouts, the choice of
kernels, Python. Shards that go through the model together share these. Autograd only computes the gradients
of the layers' outputs. From these and the layers' inputs, each shard's parameter gradients are one product
per layer, as in backpropagation by hand.

No kernel promises that an image gets the same bits in a larger batch: see `batch_invariance`.

Names follow torch: `grad_logits` is the gradient of the loss with respect to the logits, `grad_output` that
with respect to a layer's output, and so on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GradientViews = tuple[Tensor, Tensor]
"""Where one layer's gradients are written: its weight's `(shards, numbers)` and its bias's."""


@dataclass(frozen=True)
class Call:
    """One call of a layer, in a pass that is recorded."""

    x: Tensor
    output: Tensor
    version: int
    """How often `x` had been changed in place."""
    node: Any
    """The output's node in autograd's graph. A later change in place gives the output another one."""


class HookedLayers:
    """The convolutions and linear layers of a model, with hooks that record their inputs and outputs.

    They compute the gradients of some models only (see `batch_invariance.matches_autograd`), and of these
    models some passes only: what a model does may depend on the images (see `can_write`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self._sizes = [sum(p.numel() for p in layer.parameters()) for layer in self._layers]
        self._parameter_ids = {id(p) for p in self.parameters}
        self._recording: dict[nn.Module, list[Call | None]] | None = None
        for layer in self._layers:
            layer.register_forward_hook(self._record)

    def hold_all_parameters(self) -> bool:
        """Return whether there are no other trained parameters, and none belongs to two layers."""
        held = [id(p) for layer in self._layers for p in layer.parameters()]
        return held == [id(p) for p in self.parameters]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the layers' inputs and outputs inside this context."""
        self._recording = {}
        try:
            yield
        finally:
            self._recorded, self._recording = self._recording, None

    def _record(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._recording is None:
            return
        call = None  # an input that is passed by name does not reach a hook
        if len(inputs) == 1:
            call = Call(inputs[0], output, inputs[0]._version, output.grad_fn)
        self._recording.setdefault(layer, []).append(call)

    def can_write(self, logits: Tensor, sizes: Sequence[int]) -> bool:
        """Return whether `write_gradients` would write autograd's gradients of the recorded pass.

        `logits` are its result, `sizes` those of its shards. If not, the recorded tensors are released.
        """
        calls = {layer: made[0] for layer, made in self._recorded.items() if len(made) == 1 and made[0]}
        possible = len(calls) == len(self._layers) and all(
            call.node is not None
            and call.output.grad_fn is call.node
            and call.x._version == call.version
            and _fits(layer, call.x, sizes)
            for layer, call in calls.items()
        )
        possible = possible and not self._parameters_reached(logits, list(calls.values()))
        if not possible:
            self._recorded.clear()
        return possible

    def _parameters_reached(self, logits: Tensor, calls: Sequence[Call]) -> bool:
        """Return whether a path through autograd's graph leads to a parameter, but through no layer."""
        seen = {call.node for call in calls}
        nodes = [logits.grad_fn, *(call.x.grad_fn for call in calls)]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in self._parameter_ids:
                return True
            nodes += [following for following, _ in node.next_functions]
        return False

    def views(self, rows: Tensor) -> list[GradientViews]:
        """Return, for each layer, the parts of `rows`, `(shards, parameters)`, for its gradients.

        A row holds the gradients of all parameters one after another, each laid out as its parameter is.
        """
        parts = rows.split(self._sizes, dim=1)
        views: list[GradientViews] = []
        for layer, part in zip(self._layers, parts, strict=True):
            count = layer.weight.numel()
            views.append((part[:, :count], part[:, count:]))
        return views

    def inputs_and_output_gradients(
        self, logits: Tensor, grad_logits: Tensor
    ) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Return each layer with its input and the gradient of its output, both in the dtype of the latter.

        The pass that computed `logits` must have been recorded. The recorded tensors are released.
        """
        recorded = [call for layer in self._layers for call in self._recorded.pop(layer) if call]
        if len(recorded) == 1 and recorded[0].output is logits:
            found: Sequence[Tensor | None] = [grad_logits]  # nothing is left for autograd
        else:
            found = backpropagate(logits, [call.output for call in recorded], grad_logits)
        grad_outputs = [
            torch.zeros_like(call.output) if grad is None else grad
            for call, grad in zip(recorded, found, strict=True)
        ]
        return [
            (layer, call.x.to(grad_output.dtype), grad_output)
            for layer, call, grad_output in zip(self._layers, recorded, grad_outputs, strict=True)
        ]

    def write_gradients(
        self, logits: Tensor, grad_logits: Tensor, sizes: Sequence[int], views: Sequence[GradientViews]
    ) -> None:
        """Write the gradients of shards of these sizes into `views`, if `can_write`.

        For `logits` and `grad_logits` see `inputs_and_output_gradients`.
        """
        recorded = self.inputs_and_output_gradients(logits, grad_logits)
        with torch.no_grad():
            for (layer, x, grad_output), layer_views in zip(recorded, views, strict=True):
                write_layer_gradients(layer, x, grad_output, sizes, layer_views)


def _fits(layer: nn.Module, x: Tensor, sizes: Sequence[int]) -> bool:
    """Return whether a layer's input can be cut into shards of these sizes."""
    if isinstance(layer, nn.Conv2d):
        return len(x) == sum(sizes)
    return len(sizes) == 1 or len(x) % sum(sizes) == 0


def backpropagate(
    logits: Tensor, inputs: Sequence[Tensor], grad_logits: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the loss with respect to `inputs`; None where it does not depend on one.

    Autograd differentiates a scalar: if it gets `grad_logits` itself, torch imports a library for symbolic
    algebra to compare two shapes, which takes a third of a second. The numbers are the same, because
    `grad_logits` is multiplied by one.
    """
    return torch.autograd.grad((logits * grad_logits).sum(), inputs, allow_unused=True)


def write_layer_gradients(
    layer: nn.Module, x: Tensor, grad_output: Tensor, sizes: Sequence[int], views: GradientViews
) -> None:
    """Write one layer's gradients, one row per shard, from its input `x` and its output's gradient."""
    if isinstance(layer, nn.Linear):
        _write_linear(layer, x, grad_output, sizes, views)
    elif isinstance(layer, nn.Conv2d):
        _write_convolution(layer, x, grad_output, sizes, views)


def _write_linear(
    layer: nn.Linear, x: Tensor, grad_output: Tensor, sizes: Sequence[int], views: GradientViews
) -> None:
    """`x` and `grad_output` are `(samples, …, features)`; a sample may have several rows of features."""
    grad_weight, grad_bias = views
    x, grad_output = x.reshape(-1, layer.in_features), grad_output.reshape(-1, layer.out_features)
    if len(set(sizes)) > 1:  # one shard after another, by the same calls that each would get alone
        rows = [size * (len(x) // sum(sizes)) for size in sizes]
        shards = zip(
            x.split(rows), grad_output.split(rows), grad_weight.split(1), grad_bias.split(1), strict=True
        )
        for shard_x, shard_grad, weight_row, bias_row in shards:
            _write_linear(layer, shard_x, shard_grad, [1], (weight_row, bias_row))
        return
    grad_weight = grad_weight.view(len(sizes), *layer.weight.shape)
    grad_output = grad_output.view(len(sizes), -1, layer.out_features)
    if x.is_contiguous():
        x = x.view(len(sizes), -1, layer.in_features)
        if grad_output.dtype == grad_weight.dtype:
            torch.bmm(grad_output.transpose(1, 2), x, out=grad_weight)
        else:
            grad_weight.copy_(torch.bmm(grad_output.transpose(1, 2), x))
    else:  # columns are contiguous, as `patches` makes them from one channel
        columns = x.t().unflatten(1, (len(sizes), -1)).transpose(0, 1)
        grad_weight.copy_(torch.bmm(columns, grad_output).transpose(1, 2))
    if layer.bias is not None:
        grad_bias.copy_(grad_output.sum(1))


def _write_convolution(
    layer: nn.Conv2d, x: Tensor, grad_output: Tensor, sizes: Sequence[int], views: GradientViews
) -> None:
    """`x` and `grad_output` are `(samples, channels, height, width)`."""
    grad_weight, grad_bias = views
    weight = layer.weight.to(grad_output.dtype)
    shards = zip(x.split(list(sizes)), grad_output.split(list(sizes)), strict=True)
    for i, (shard_x, shard_grad) in enumerate(shards):
        _, shard_grad_weight, _ = torch.ops.aten.convolution_backward(
            shard_grad, shard_x, weight, None, layer.stride, layer.padding,
            layer.dilation, False, [0, 0], layer.groups, [False, True, False],
        )  # fmt: skip
        row = grad_weight[i]
        view = row.as_strided(weight.shape, layer.weight.stride(), row.storage_offset())
        view.copy_(shard_grad_weight)
        if layer.bias is not None:  # not by the same call as the weight's, which would take longer with it
            torch.sum(shard_grad, (0, 2, 3), dtype=grad_bias.dtype, out=grad_bias[i])
