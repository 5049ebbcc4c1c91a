"""Max pooling. Of several equal maxima in a window the first one gets the gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..passes import Pass
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
    above, left = window.padding
    if above or left:
        x = F.pad(x, (left, left, above, above), value=-torch.inf)
    return MaxPool.apply(x, window)  # type: ignore[no-any-return]


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
