"""Sums and means within a sample, in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ordered_sums import sum_over
from ..passes import Pass


def mean(pass_: Pass, x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """Return the mean over these dimensions, float32; see `torch.mean`. They must not be those of
    samples."""
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim))
    return Mean.apply(x, dims, keepdim)  # type: ignore[no-any-return]


class Mean(torch.autograd.Function):
    """A mean over dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
        total = x.to(torch.float64)
        for dim in reversed(dims):
            total = sum_over(total, dim)
        count = x.numel() // max(total.numel(), 1)
        ctx.shape, ctx.dims, ctx.keepdim = x.shape, dims, keepdim
        ctx.count = torch.full((), float(max(count, 1)), dtype=torch.float64, device=x.device)
        result = (total / ctx.count).to(torch.float32)
        return _unsqueezed(result, dims) if keepdim else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        share = (gradient.to(torch.float64) / ctx.count).to(torch.float32)
        return (share if ctx.keepdim else _unsqueezed(share, ctx.dims)).expand(ctx.shape), None, None


def _unsqueezed(x: Tensor, dims: list[int]) -> Tensor:
    for dim in dims:
        x = x.unsqueeze(dim)
    return x
