"""Max and average pooling. Of several equal maxima in a window the first one gets the gradient."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ordered_sums import first_largest
from ..passes.interface import Pass
from ..refusal import Refused
from .convolution import Pair, Window, pair


def max_pool2d(
    pass_: Pass,
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Return the largest value in each window of float32 `(n, c, h, w)`; see `torch.nn.functional`.

    Raises `Refused` for `ceil_mode` and `return_indices`.
    """
    if ceil_mode or return_indices:
        raise Refused("max pooling with ceil_mode or return_indices has no exact form")
    kernel = pair(kernel_size)
    window = Window(kernel, pair(stride) if stride else kernel, pair(padding), pair(dilation))
    apart = all(s >= k for s, k in zip(window.stride, kernel, strict=True))  # no gradients are added
    if apart and window.padding == (0, 0) and window.dilation == (1, 1) and _first_wins(x.device):
        return F.max_pool2d(x, kernel, window.stride)
    above, left = window.padding
    if above or left:
        x = F.pad(x, (left, left, above, above), value=-torch.inf)
    return MaxPool.apply(x, window)  # type: ignore[no-any-return]


@functools.cache
def _first_wins(device: torch.device) -> bool:
    """Return whether torch's own max pooling, which is faster, chooses the first of equal maxima here."""
    values = torch.randint(3, (5, 40, 12, 18), generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = values.to(device, torch.float32).contiguous(memory_format=layout)
        for kernel in ((2, 2), (3, 2)):
            window = Window(kernel, kernel, (0, 0), (1, 1))
            slices = window.slices(*x.shape[2:])
            stacked = torch.stack([x[:, :, vertical, horizontal] for vertical, horizontal in slices])
            expected = first_largest(stacked, 0)
            _, indices = F.max_pool2d(x, kernel, return_indices=True)
            row, column = indices // x.shape[3] % kernel[0], indices % x.shape[3] % kernel[1]
            if not torch.equal(row * kernel[1] + column, expected):
                return False
    return True


class MaxPool(torch.autograd.Function):
    """Max pooling of `(n, c, h, w)`, padded already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        slices = window.slices(*x.shape[2:])
        largest = x[:, :, slices[0][0], slices[0][1]]
        place = torch.zeros_like(largest, dtype=torch.uint8)
        for number, (vertical, horizontal) in enumerate(slices[1:], start=1):
            values = x[:, :, vertical, horizontal]
            place.masked_fill_(values > largest, number)
            largest = torch.maximum(largest, values)
        ctx.save_for_backward(place)
        ctx.slices, ctx.shape = slices, x.shape
        ctx.strides = x.stride()
        return largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (place,) = ctx.saved_tensors
        total = torch.empty_strided(
            ctx.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device
        ).zero_()
        for number, (vertical, horizontal) in enumerate(ctx.slices):
            # The windows may overlap: then several gradients are added, always in this order.
            total[:, :, vertical, horizontal] += gradient * (place == number)
        return total, None


def avg_pool2d(
    pass_: Pass,
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Return the mean of each window of float32 `(n, c, h, w)`; see `torch.nn.functional`.

    Raises `Refused` for `ceil_mode`.
    """
    if ceil_mode:
        raise Refused("average pooling with ceil_mode has no exact form")
    kernel = pair(kernel_size)
    window = Window(kernel, pair(stride) if stride else kernel, pair(padding), (1, 1))
    above, left = window.padding
    sides = (left, left, above, above)
    count = torch.full((), float(divisor_override or kernel[0] * kernel[1]), device=x.device)
    if not count_include_pad and divisor_override is None:
        inside = F.pad(torch.ones((1, 1, *x.shape[2:]), device=x.device), sides)
        count = _added(inside, window)
    return AveragePool.apply(F.pad(x, sides), window, count)  # type: ignore[no-any-return]


def _added(x: Tensor, window: Window) -> Tensor:
    """Return the sum of each window, always in the same order."""
    (first, *others) = (x[:, :, rows, columns] for rows, columns in window.slices(*x.shape[2:]))
    total = first.clone()
    for values in others:
        total += values
    return total


class AveragePool(torch.autograd.Function):
    """Sums of windows of `(n, c, h, w)`, padded already, divided by counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window, count: Tensor) -> Tensor:
        ctx.slices, ctx.shape, ctx.count = window.slices(*x.shape[2:]), x.shape, count
        return _added(x, window) / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        share = gradients[0] / ctx.count
        total = share.new_zeros(ctx.shape)
        for vertical, horizontal in ctx.slices:
            total[:, :, vertical, horizontal] += share
        return total, None, None


def adaptive_avg_pool2d(pass_: Pass, x: Tensor, output_size: Any) -> Tensor:
    """Return means of windows that tile `(n, c, h, w)`. Raises `Refused` if they would overlap."""
    return avg_pool2d(pass_, x, _tile(x, output_size))


def adaptive_max_pool2d(pass_: Pass, x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    """Return maxima of windows that tile `(n, c, h, w)`. Raises `Refused` if they would overlap."""
    return max_pool2d(pass_, x, _tile(x, output_size), return_indices=return_indices)


def _tile(x: Tensor, output_size: Any) -> Pair:
    """Return the size of windows that tile an image to give a number of rows and columns."""
    sides = (x.shape[-2], x.shape[-1])
    given = (output_size, output_size) if isinstance(output_size, int) else output_size
    rows, columns = (side if size is None else size for side, size in zip(sides, given, strict=True))
    if sides[0] % rows or sides[1] % columns:
        raise Refused(
            f"adaptive pooling of {sides[0]} x {sides[1]} pixels to {rows} x {columns} has no exact form, "
            "because the windows would differ"
        )
    return sides[0] // rows, sides[1] // columns
