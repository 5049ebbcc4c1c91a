"""Several shards in one pass through a model, with a gradient for each of them.

A pass over one small shard spends much of its time getting started: casts, layouts, the choice of kernels,
Python. Shards that go through together share that. Autograd is asked for the gradients of the layers'
outputs only; from those and the layers' inputs each shard's gradient of the parameters is one product a
layer, as in backpropagation by hand.

Whether a kernel gives an image the same bits in larger company is nowhere promised: see `company`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Places = list[tuple[Tensor, Tensor]]
"""Of each layer, its weight's gradients `(shards, numbers)` and its bias's."""


class Layers:
    """The convolutions and linear layers of a model, which hold all of its parameters: see `understood`."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self._sizes = [sum(p.numel() for p in layer.parameters()) for layer in self._layers]
        self._noted: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
        for layer in self._layers:
            layer.register_forward_hook(self._note)

    def hold_all(self) -> bool:
        """Whether there are no other trained parameters, and none stands in two places."""
        held = [id(p) for layer in self._layers for p in layer.parameters()]
        return held == [id(p) for p in self.parameters]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the layers' inputs and outputs are noted."""
        self._noted = {}
        try:
            yield
        finally:
            self._seen, self._noted = self._noted, None

    def _note(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._noted is None:
            return
        if layer in self._noted:
            raise ValueError("a layer is used twice")
        if len(inputs) != 1:
            raise ValueError("a layer is called by keyword")
        self._noted[layer] = (inputs[0], output)

    def places(self, rows: Tensor) -> Places:
        """Where in `rows`, `(shards, parameters)`, each layer's gradients belong.

        A row holds the parameters' gradients one after the other, each laid out as its parameter is.
        """
        parts = rows.split(self._sizes, dim=1)
        places: Places = []
        for layer, part in zip(self._layers, parts, strict=True):
            count = layer.weight.numel()
            places.append((part[:, :count], part[:, count:]))
        return places

    def noted(self, logits: Tensor, outer: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Each layer with its input and the gradient of its output, in the latter's type.

        The pass that gave the logits was watched; `outer` is the loss's gradient by them.
        """
        seen = [self._seen.pop(layer) for layer in self._layers]
        if len(seen) == 1 and seen[0][1] is logits:
            inner: Sequence[Tensor] = [outer]  # nothing to ask autograd for
        else:
            inner = by_chain_rule(logits, [output for _, output in seen], outer)
        return [
            (layer, x.to(g.dtype), g) for layer, (x, _), g in zip(self._layers, seen, inner, strict=True)
        ]

    def gradients(self, logits: Tensor, outer: Tensor, sizes: Sequence[int], places: Places) -> None:
        """Put each shard's gradient into its row; for `logits` and `outer` see `noted`."""
        noted = self.noted(logits, outer)
        with torch.no_grad():
            for (layer, x, g), place in zip(noted, places, strict=True):
                gradient(layer, x, g, sizes, *place)


def by_chain_rule(logits: Tensor, inputs: Sequence[Tensor], outer: Tensor) -> tuple[Tensor, ...]:
    """The loss's gradients by `inputs`, None where there is none, from `outer`, those by the logits.

    By way of a scalar: given `outer` itself, torch imports a library of symbolic algebra to compare two
    shapes, for a third of a second. The numbers are the same: `outer` is multiplied by one.
    """
    return torch.autograd.grad((logits * outer).sum(), inputs, allow_unused=True)


def gradient(
    layer: nn.Module, x: Tensor, g: Tensor, sizes: Sequence[int], of_weight: Tensor, of_bias: Tensor
) -> None:
    """One layer's gradients, a row a shard, from its input and the gradient of its output."""
    if isinstance(layer, nn.Linear):
        _linear(layer, x, g, sizes, of_weight, of_bias)
    elif isinstance(layer, nn.Conv2d):
        _convolution(layer, x, g, sizes, of_weight, of_bias)


def _linear(
    layer: nn.Linear, x: Tensor, g: Tensor, sizes: Sequence[int], of_weight: Tensor, of_bias: Tensor
) -> None:
    """The layer's input `x` and the gradient `g` of its output: `(samples * rows of each, features)`."""
    x, g = x.reshape(-1, layer.in_features), g.reshape(-1, layer.out_features)
    if len(set(sizes)) > 1:  # one after the other, by the very calls that each would get alone
        cuts = [size * (len(x) // sum(sizes)) for size in sizes]
        places = zip(of_weight.split(1), of_bias.split(1), strict=True)
        for part_x, part_g, place in zip(x.split(cuts), g.split(cuts), places, strict=True):
            _linear(layer, part_x, part_g, [1], *place)
        return
    weights = of_weight.view(len(sizes), *layer.weight.shape)
    g = g.view(len(sizes), -1, layer.out_features)
    if x.is_contiguous():
        x = x.view(len(sizes), -1, layer.in_features)
        if g.dtype == weights.dtype:
            torch.bmm(g.transpose(1, 2), x, out=weights)
        else:
            weights.copy_(torch.bmm(g.transpose(1, 2), x))
    else:  # columns in a row, as `patches` makes them of one channel
        columns = x.t().unflatten(1, (len(sizes), -1)).transpose(0, 1)
        weights.copy_(torch.bmm(columns, g).transpose(1, 2))
    if layer.bias is not None:
        of_bias.copy_(g.sum(1))


def _convolution(
    layer: nn.Conv2d, x: Tensor, g: Tensor, sizes: Sequence[int], of_weight: Tensor, of_bias: Tensor
) -> None:
    """The layer's input `x` and the gradient `g` of its output: `(samples, channels, h, w)`."""
    weight = layer.weight.to(g.dtype)
    for i, (shard_x, shard_g) in enumerate(zip(x.split(list(sizes)), g.split(list(sizes)), strict=True)):
        _, w, _ = torch.ops.aten.convolution_backward(
            shard_g, shard_x, weight, None, layer.stride, layer.padding,
            layer.dilation, False, [0, 0], layer.groups, [False, True, False],
        )  # fmt: skip
        row = of_weight[i]
        row.as_strided(weight.shape, layer.weight.stride(), row.storage_offset()).copy_(w)
        if layer.bias is not None:  # apart from the weight's, which would take longer with it
            torch.sum(shard_g, (0, 2, 3), dtype=of_bias.dtype, out=of_bias[i])
