"""Layer, group, instance and root-mean-square normalisation: statistics within a sample."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..elementary import sqrt
from ..ordered_sums import sum_over_
from ..parameter_views import follow
from ..passes.interface import Pass
from ..refusal import Refused
from .broadcasting import elementwise


class Normalised(torch.autograd.Function):
    """Rows `(m, count)`, float32, divided by their standard deviation, or by their root mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool) -> Tensor:
        y = x.to(torch.float64, copy=True)
        ctx.count = torch.full((), float(x.shape[1]), dtype=torch.float64, device=x.device)
        ctx.centred = centred
        if centred:
            y -= _mean(y.clone(), ctx.count)
        root = sqrt(_mean(y * y, ctx.count).add_(eps))
        y = (y / root).to(torch.float32)
        ctx.save_for_backward(y, root)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        y, root = ctx.saved_tensors
        gradient, y = gradients[0].to(torch.float64), y.to(torch.float64)
        rest = gradient - y * _mean(gradient * y, ctx.count)
        if ctx.centred:
            rest -= _mean(gradient.clone(), ctx.count)
        return (rest / root).to(torch.float32), None, None


def _mean(x: Tensor, count: Tensor) -> Tensor:
    """Return the means of rows, `(m, 1)`. It overwrites the rows."""
    return (sum_over_(x, 1) / count).unsqueeze(1)


def _affine(pass_: Pass, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None and bias is None:
        return x.clone()  # the caller may change it in place, but the gradient needs it
    if weight is not None:
        x = elementwise(pass_, torch.mul, x, weight)
    return x if bias is None else elementwise(pass_, torch.add, x, bias)


def layer_norm(
    pass_: Pass,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return the layer norm, float32, over the last dimensions; see `torch.nn.functional`."""
    rows = x.reshape(-1, math.prod(normalized_shape))
    return _affine(pass_, Normalised.apply(rows, eps, True).view(x.shape), weight, bias)


def rms_norm(
    pass_: Pass,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return `x` divided by its root mean square over the last dimensions; see `torch.nn.functional`."""
    rows = x.reshape(-1, math.prod(normalized_shape))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _affine(pass_, Normalised.apply(rows, eps, False).view(x.shape), weight, None)


def group_norm(
    pass_: Pass,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return the group norm, float32, of `(n, channels, ...)`; see `torch.nn.functional`."""
    rows = x.reshape(len(x) * num_groups, -1)
    normalised = Normalised.apply(rows, eps, True).view(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    weight, bias = (p if p is None else follow(pass_, Tensor.view, p, shape) for p in (weight, bias))
    return _affine(pass_, normalised, weight, bias)


def instance_norm(
    pass_: Pass,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return the instance norm, float32. Raises `Refused` for running statistics."""
    if running_mean is not None or not use_input_stats:
        raise Refused("instance norm with running statistics has no exact form")
    return group_norm(pass_, x, x.shape[1], weight, bias, eps)
