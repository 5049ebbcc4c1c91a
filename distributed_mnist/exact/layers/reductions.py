"""Sums, means and maxima within a sample. Sums are added in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ordered_sums import sum_over
from ..passes.interface import Pass
from ..refusal import Refused

Dims = int | Sequence[int] | None


def mean(pass_: Pass, x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Return the mean over these dimensions, float32; see `torch.mean`. They must not be those of
    samples."""
    return Sum.apply(x, _dims(x, dim, dtype), keepdim, True)  # type: ignore[no-any-return]


def sum_(pass_: Pass, x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Return the sum over these dimensions, float32; see `torch.sum`. They must not be those of samples."""
    return Sum.apply(x, _dims(x, dim, dtype), keepdim, False)  # type: ignore[no-any-return]


def _dims(x: Tensor, dim: Dims, dtype: Any = None) -> list[int]:
    if dim is None or dim in ((), []) or dtype not in (None, torch.float32) or x.dtype != torch.float32:
        raise Refused("a sum or mean without dim, or of another dtype than float32, has no exact form")
    return sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim))


class Sum(torch.autograd.Function):
    """A sum or a mean over dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], keepdim: bool, is_mean: bool) -> Tensor:
        total = x.to(torch.float64)
        for dim in reversed(dims):
            total = sum_over(total, dim)
        count = x.numel() // max(total.numel(), 1) if is_mean else 1
        ctx.shape, ctx.dims, ctx.keepdim = x.shape, dims, keepdim
        ctx.count = torch.full((), float(max(count, 1)), dtype=torch.float64, device=x.device)
        result = (total / ctx.count).to(torch.float32)
        return _unsqueezed(result, dims) if keepdim else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        share = (gradient.to(torch.float64) / ctx.count).to(torch.float32)
        share = share if ctx.keepdim else _unsqueezed(share, ctx.dims)
        return share.expand(ctx.shape), None, None, None


def _unsqueezed(x: Tensor, dims: list[int]) -> Tensor:
    for dim in dims:
        x = x.unsqueeze(dim)
    return x


def amax(pass_: Pass, x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """Return the maximum over these dimensions; see `torch.amax`. Of equal maxima the first one gets the
    gradient."""
    dims = _dims(x, dim)
    others = [d for d in range(x.ndim) if d not in dims]
    result = _largest(x.permute(*others, *dims).flatten(len(others)), -1)[0].squeeze(-1)
    return _unsqueezed(result, dims) if keepdim else result


def max_(pass_: Pass, x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Return maxima over one dimension and their indices, the first of equal ones; see `torch.max`."""
    if not isinstance(dim, int):
        raise Refused("max without dim has no exact form (of two tensors: use torch.maximum)")
    values, indices = _largest(x, dim)
    if not keepdim:
        values, indices = values.squeeze(dim), indices.squeeze(dim)
    return torch.return_types.max((values, indices))  # type: ignore[attr-defined]


def _largest(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the first maxima along a dimension, with size one there, and their indices."""
    size, values = x.shape[dim], x.detach()
    places = torch.arange(size, device=x.device).view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
    indices = torch.where(values == values.amax(dim, keepdim=True), places, size - 1).amin(
        dim, keepdim=True
    )
    return x.gather(dim, indices), indices
