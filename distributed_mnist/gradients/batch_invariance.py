"""Test whether a shard's gradient has the same bits in a larger batch as alone.

Kernels may add in a different order for a different batch size. So the program relies on batch invariance
only if it holds in a test on this machine with exactly these sizes. On ordinary numbers a different order
changes only a few last bits, and rounding to bf16 hides most of these, so such a test could pass by chance.
Therefore each layer is also tested on numbers whose sums are zero. The results are then pure rounding
error, which changes with the order.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..common.generators import ShardDraws, same_torch_state, seed_torch
from .loss import cross_entropy
from .per_shard import HookedLayers, backpropagate, write_layer_gradients

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Returns the logits of images, as training computes them."""


def matches_autograd(model: nn.Module, shape: Sequence[int]) -> bool:
    """Return whether `HookedLayers` computes autograd's gradients, on images of this shape.

    This is tested, not deduced from the types of the layers, because a model may also use its parameters
    outside its layers.
    """
    try:
        with same_torch_state():
            return _gradients_agree(model, shape)
    except Exception:  # a user's model may refuse to be copied, or use a layer in an unknown way
        return False


def _gradients_agree(model: nn.Module, shape: Sequence[int]) -> bool:
    model, generator = _perturbed_copy(model)
    layers = HookedLayers(model)
    if not layers.hold_all_parameters():
        return False
    images = torch.randn(2, *shape, generator=generator).to(layers.parameters[0].device)
    seed_torch(0)  # a model may draw random numbers
    with layers.recording():
        logits = model(images)
    if not layers.can_write(logits, [len(images)]):
        return False
    grad_logits = torch.randn(logits.shape, generator=generator).to(logits.device)
    row = torch.empty(1, sum(p.numel() for p in layers.parameters), device=logits.device)
    layers.write_gradients(logits, grad_logits, [len(images)], layers.views(row))
    seed_torch(0)
    expected = backpropagate(model(images), layers.parameters, grad_logits)
    tolerance = 1e-4 if images.device.type == "cpu" else 1e-2  # other devices may round to fewer bits
    parts = row[0].split([p.numel() for p in layers.parameters])
    return all(
        g is not None
        and torch.allclose(
            part, (flat := in_memory_order(g, p)), rtol=0, atol=tolerance * float(flat.abs().max())
        )
        for part, g, p in zip(parts, expected, layers.parameters, strict=True)
    )


def is_batch_invariant(
    model: nn.Module, forward: Forward, shape: Sequence[int], sizes: Sequence[int]
) -> bool:
    """Return whether shards of these sizes get the same gradients in one pass as in a pass each.

    `shape` is that of one image.
    """
    try:
        with same_torch_state():
            return _same_in_one_pass(model, forward, shape, sizes)
    except Exception:  # what a user's model does may depend on the images
        return False


def _same_in_one_pass(
    model: nn.Module, forward: Forward, shape: Sequence[int], sizes: Sequence[int]
) -> bool:
    model, generator = _perturbed_copy(model)
    layers = HookedLayers(model)
    count = sum(p.numel() for p in layers.parameters)
    images = torch.randn(sum(sizes), *shape, generator=generator).to(layers.parameters[0].device)

    def recorded_pass(images: Tensor, sizes: Sequence[int], seed: int | None = None) -> Tensor:
        """Run the shards together or, with `seed`, one alone, with the same random numbers."""
        if seed is not None:
            seed_torch(seed)
        together = nullcontext() if seed is not None else ShardDraws(range(len(sizes)), sizes)
        with layers.recording(), together:
            logits = forward(model, images.clone())
        if not layers.can_write(logits, sizes):
            raise ValueError("a layer is not used as a layer")
        return logits

    def gradients(images: Tensor, sizes: Sequence[int], seed: int | None = None) -> Tensor:
        logits = recorded_pass(images, sizes, seed)
        rows = torch.empty(len(sizes), count, device=logits.device)
        grad_logits = cross_entropy(logits, logits.argmin(1))[1]
        layers.write_gradients(logits, grad_logits, sizes, layers.views(rows))
        return rows

    shards = images.split(list(sizes))
    separate = [gradients(shard, [len(shard)], seed) for seed, shard in enumerate(shards)]
    if not torch.equal(gradients(images, sizes), torch.cat(separate)):
        return False
    logits = recorded_pass(images, sizes)
    recorded = layers.inputs_and_output_gradients(logits, torch.ones_like(logits))
    return all(_keeps_order(layer, x, grad_output, sizes, generator) for layer, x, grad_output in recorded)


def _keeps_order(
    layer: nn.Module, x: Tensor, grad_output: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> bool:
    """Return whether the layer's three products add in the same order for one shard as for all.

    The three are the output, the gradient of the input and that of the weight. They are computed from
    numbers that cancel, in the memory layout of `x` and `grad_output`. All shards of one size get the same
    numbers.
    """
    rows_per_sample = len(x) // sum(sizes)
    bf16 = grad_output.dtype == torch.bfloat16

    def wild(*shape: int) -> Tensor:
        """Return numbers of many magnitudes, so that every addition rounds."""
        return torch.randn(shape, generator=generator).pow_(3).to(x)

    def cancelling(count: int, *shape: int) -> Tensor:
        """Return numbers whose second half is the first half with the opposite sign."""
        first = wild(count // 2, *shape)
        return torch.cat([first, -first, first.new_zeros(count % 2, *shape)])

    def output_and_grad_input(part: Tensor, part_grad: Tensor) -> tuple[Tensor, Tensor]:
        part.requires_grad_(x.requires_grad)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = layer(part)
        grad_input = backpropagate(output, [part], part_grad)[0] if x.requires_grad else None
        return output.detach(), (output if grad_input is None else grad_input).detach()

    def joined(parts: dict[int, Tensor], like: Tensor) -> Tensor:
        return _in_layout_of(like, torch.cat([parts[size] for size in sizes]))

    weight = layer.get_parameter("weight")
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        # Cancels over the inputs, for the output, and over the outputs, for the input's gradient.
        cancelling_weight = cancelling(weight.flatten(1).shape[1], len(weight)).t().float().contiguous()
        half = len(cancelling_weight) // 2
        cancelling_weight[half : 2 * half] = -cancelling_weight[:half]
        cancelling_weight[2 * half :] = 0
        weight.copy_(cancelling_weight.view(weight.shape))
    inputs, grads = {}, {}
    for size in set(sizes):
        count, ones = size * rows_per_sample, [1] * (x.ndim - 1)
        inputs[size] = _in_layout_of(x, wild(count, *ones).expand(count, *x.shape[1:]))
        grads[size] = _in_layout_of(grad_output, wild(count, *ones).expand(count, *grad_output.shape[1:]))
    separate = {size: output_and_grad_input(inputs[size].clone(), grads[size]) for size in inputs}
    together = output_and_grad_input(joined(inputs, x), joined(grads, grad_output))
    for i in (0, 1):
        if not torch.equal(together[i], torch.cat([separate[size][i] for size in sizes])):
            return False
    for size in set(sizes):
        count = size * rows_per_sample
        inputs[size] = _in_layout_of(x, cancelling(count, *x.shape[1:]))
        grads[size] = _in_layout_of(grad_output, wild(count, *grad_output.shape[1:]))
        grads[size][count // 2 : count // 2 * 2] = grads[size][: count // 2]  # the same for both halves
    separate_rows = {size: _gradient_rows(layer, inputs[size], grads[size], [size]) for size in inputs}
    rows = _gradient_rows(layer, joined(inputs, x), joined(grads, grad_output), sizes)
    return torch.equal(rows, torch.cat([separate_rows[size] for size in sizes]))


@torch.no_grad()
def _gradient_rows(layer: nn.Module, x: Tensor, grad_output: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the gradients of the layer's weight and bias, one row per shard."""
    count = layer.get_parameter("weight").numel()
    rows = torch.zeros(len(sizes), sum(p.numel() for p in layer.parameters()), device=x.device)
    write_layer_gradients(layer, x, grad_output, sizes, (rows[:, :count], rows[:, count:]))
    return rows


def _in_layout_of(like: Tensor, values: Tensor) -> Tensor:
    """Copy `values` into the memory layout of `like`: contiguous rows, columns or channels."""
    if values.ndim == 2 and not like.is_contiguous():
        return values.t().clone(memory_format=torch.contiguous_format).t()
    if values.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return values.clone(memory_format=torch.channels_last)
    return values.clone(memory_format=torch.contiguous_format)


def _perturbed_copy(model: nn.Module) -> tuple[nn.Module, torch.Generator]:
    """Copy the model and change its weights a little: a layer of zeros would hide the layers behind it."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.device), alpha=0.05)
    return model, generator


def in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient's values in the order in which its parameter's values lie in memory."""
    flat = gradient.new_empty(gradient.numel())
    flat.as_strided(parameter.shape, parameter.stride()).copy_(gradient)
    return flat
