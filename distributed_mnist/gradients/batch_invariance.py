"""Whether a shard has the same gradient, to the bit, in company as alone: tried, on this machine, with the
very sizes, before it is relied on.

Kernels may add in another order for other sizes. On usual numbers that changes a last bit here and there,
and none that shows where results are rounded to bf16: a trial could pass by luck. So each layer is also
tried on numbers whose sums are zero: what comes out is rounding alone, and changes with the order.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .loss import cross_entropy
from .per_shard import Layers, by_chain_rule, gradient

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Logits of images, as training computes them."""


def understood(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether `Layers` finds the gradients that autograd finds, on images of this shape.

    Tried rather than looked up: a model may do more with its parameters than to convolve and multiply.
    """
    try:
        return _gradients_agree(model, shape)
    except Exception:  # a stranger's model: it may not be copied, or use a layer in a way not known here
        return False


def _gradients_agree(model: nn.Module, shape: Sequence[int]) -> bool:
    model, noise = _tried_copy(model)
    layers = Layers(model)
    if not layers.hold_all():
        return False
    images = torch.randn(2, *shape, generator=noise).to(layers.parameters[0].device)
    with layers.watched():
        logits = model(images)
    outer = torch.randn(logits.shape, generator=noise).to(logits.device)
    by_hand = torch.empty(1, sum(p.numel() for p in layers.parameters), device=logits.device)
    layers.gradients(logits, outer, [len(images)], layers.places(by_hand))
    by_autograd = by_chain_rule(model(images), layers.parameters, outer)
    exact = 1e-4 if images.device.type == "cpu" else 1e-2  # other devices may round to fewer bits
    parts = by_hand[0].split([p.numel() for p in layers.parameters])
    return all(
        torch.allclose(part, (flat := _as_in_memory(g, p)), rtol=0, atol=exact * float(flat.abs().max()))
        for part, g, p in zip(parts, by_autograd, layers.parameters, strict=True)
    )


def same_bits(model: nn.Module, forward: Forward, shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether shards of these sizes, images of this shape, have the same gradients together and apart."""
    model, noise = _tried_copy(model)
    layers = Layers(model)
    count = sum(p.numel() for p in layers.parameters)
    images = torch.randn(sum(sizes), *shape, generator=noise).to(layers.parameters[0].device)

    def gradients(images: Tensor, sizes: Sequence[int]) -> Tensor:
        with layers.watched():
            logits = forward(model, images.clone())
        rows = torch.empty(len(sizes), count, device=logits.device)
        outer = cross_entropy(logits, logits.argmin(1))[1]
        layers.gradients(logits, outer, sizes, layers.places(rows))
        return rows

    apart = [gradients(shard, [len(shard)]) for shard in images.split(list(sizes))]
    if not torch.equal(gradients(images, sizes), torch.cat(apart)):
        return False
    with layers.watched():
        logits = forward(model, images.clone())
    noted = layers.noted(logits, torch.ones_like(logits))
    return all(_keeps_order(layer, x, g, sizes, noise) for layer, x, g in noted)


def _keeps_order(
    layer: nn.Module, x: Tensor, g: Tensor, sizes: Sequence[int], noise: torch.Generator
) -> bool:
    """Whether the layer's three products add in one order: on numbers that cancel, in the layout of
    these. All shards of a size are given the same numbers."""
    rows_each = len(x) // sum(sizes)
    bf16 = g.dtype == torch.bfloat16

    def wild(*shape: int) -> Tensor:
        """Of many magnitudes, so that every addition rounds."""
        return torch.randn(shape, generator=noise).pow_(3).to(x)

    def cancelling(count: int, *shape: int) -> Tensor:
        """The second half takes back what the first half gave."""
        first = wild(count // 2, *shape)
        return torch.cat([first, -first, first.new_zeros(count % 2, *shape)])

    def passed(part: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the gradient of the input."""
        part.requires_grad_(x.requires_grad)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = layer(part)
        found = by_chain_rule(output, [part], outer)[0] if x.requires_grad else output
        return output.detach(), found.detach()

    def joined(parts: dict[int, Tensor], like: Tensor) -> Tensor:
        return _laid_out(torch.cat([parts[size] for size in sizes]), like)

    weight = layer.get_parameter("weight")
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        # Sums to zero over inputs, for the output, and over outputs, for the input's gradient.
        across = cancelling(weight.flatten(1).shape[1], len(weight)).t().float().contiguous()
        half = len(across) // 2
        across[half : 2 * half] = -across[:half]
        across[2 * half :] = 0
        weight.copy_(across.view(weight.shape))
    inputs, outer = {}, {}
    for size in set(sizes):
        count, ones = size * rows_each, [1] * (x.ndim - 1)
        inputs[size] = _laid_out(wild(count, *ones).expand(count, *x.shape[1:]), x)
        outer[size] = _laid_out(wild(count, *ones).expand(count, *g.shape[1:]), g)
    alone = {size: passed(inputs[size].clone(), outer[size]) for size in inputs}
    whole = passed(joined(inputs, x), joined(outer, g))
    if not all(torch.equal(whole[i], torch.cat([alone[size][i] for size in sizes])) for i in (0, 1)):
        return False
    for size in set(sizes):
        count = size * rows_each
        inputs[size] = _laid_out(cancelling(count, *x.shape[1:]), x)
        outer[size] = _laid_out(wild(count, *g.shape[1:]), g)
        outer[size][count // 2 : count // 2 * 2] = outer[size][: count // 2]  # the same for both halves
    apart = {size: _rows(layer, inputs[size], outer[size], [size]) for size in inputs}
    together = _rows(layer, joined(inputs, x), joined(outer, g), sizes)
    return torch.equal(together, torch.cat([apart[size] for size in sizes]))


@torch.no_grad()
def _rows(layer: nn.Module, x: Tensor, g: Tensor, sizes: Sequence[int]) -> Tensor:
    count = layer.get_parameter("weight").numel()
    rows = torch.zeros(len(sizes), sum(p.numel() for p in layer.parameters()), device=x.device)
    gradient(layer, x, g, sizes, rows[:, :count], rows[:, count:])
    return rows


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """A copy, rows or columns or channels together in memory as they are in `like`."""
    if values.ndim == 2 and not like.is_contiguous():
        return values.t().clone(memory_format=torch.contiguous_format).t()
    if values.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return values.clone(memory_format=torch.channels_last)
    return values.clone(memory_format=torch.contiguous_format)


def _tried_copy(model: nn.Module) -> tuple[nn.Module, torch.Generator]:
    """A copy with its weights moved a little: a layer of zeros would hide what is behind it."""
    noise = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise).to(p.device), alpha=0.05)
    return model, noise


def _as_in_memory(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient's values in the order in which its parameter's lie in memory."""
    flat = gradient.new_empty(gradient.numel())
    flat.as_strided(parameter.shape, parameter.stride()).copy_(gradient)
    return flat
