"""Compute convolutions as matrix products, which is fastest for small ones on a CPU.

A convolution multiplies every `k` by `k` patch of its input with one matrix. Here the patches are first
copied into the rows of a matrix, and an ordinary linear layer does the product. For a few channels this is
faster than a library's convolution, and each shard's weight gradient is a matrix product too
(`gradients.per_shard`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from ..exact.functions import are_exact
from ..exact.layers import convolution
from ..exact.layers.table import LAYERS


class PatchConv(nn.Module):
    """A convolution without padding, from `(n, h, w, c)` to `(n, (h-k)//s + 1, (w-k)//s + 1, out)`.

    Its weight is that of the linear layer inside, `(out, k*k*c)`, in the order row, column, channel.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.product = nn.Linear(kernel * kernel * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x`; for the shapes see the class."""
        if are_exact():  # exact arithmetic has a convolution of its own
            weight, bias = self.product.weight, self.product.bias
            return handle_torch_function(patch_conv, (x,), x, weight, bias, self.kernel, self.stride)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Cast each value once, before it is copied into several patches.
            x = x.to(torch.get_autocast_dtype(device))
        rows, columns = ((side - self.kernel) // self.stride + 1 for side in x.shape[1:3])
        return self.product(patches(x, self.kernel, self.stride)).view(x.shape[0], rows, columns, -1)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the convolution of `PatchConv`, `(n, rows, columns, out)`, with a weight `(out, k*k*c)`."""
    rows, columns = ((side - kernel) // stride + 1 for side in x.shape[1:3])
    return F.linear(patches(x, kernel, stride), weight, bias).view(x.shape[0], rows, columns, -1)


LAYERS[patch_conv] = convolution.patch_conv


def patches(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Return all patches of images `(n, h, w, c)` as rows, `(n * rows * columns, kernel * kernel * c)`."""
    n, height, width, channels = x.shape
    if kernel == stride and height % kernel == width % kernel == 0:  # the patches tile the image
        tiles = x.reshape(n, height // kernel, kernel, width // kernel, kernel * channels)
        return tiles.transpose(2, 3).reshape(-1, kernel * kernel * channels)
    if x.requires_grad:
        return _Patches.apply(x, kernel, stride)  # type: ignore[no-any-return]
    return _copy_patches(x, kernel, stride)


def _copy_patches(x: Tensor, kernel: int, stride: int) -> Tensor:
    views = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (n, rows, columns, c, kernel, kernel)
    size = kernel * kernel * x.shape[3]
    if x.shape[3] == 1:  # to copy one pixel of all patches at a time is faster than rows of a few pixels
        return views.permute(4, 5, 3, 0, 1, 2).reshape(size, -1).t()
    return views.permute(0, 1, 2, 4, 5, 3).reshape(-1, size)


class _Patches(torch.autograd.Function):
    """`_copy_patches` with a backward pass that adds whole rows; torch's own adds single pixels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        return _copy_patches(x, kernel, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (n, height, width, channels), kernel, stride = ctx.shape, ctx.kernel, ctx.stride
        rows, columns = ((side - kernel) // stride + 1 for side in (height, width))
        patch_rows = gradient.float().view(n, rows, columns, kernel, kernel * channels)
        total = patch_rows.new_zeros((n, height, width * channels))
        views = total.unfold(1, kernel, stride).unfold(2, kernel * channels, stride * channels)
        for row_views, row in zip(views.unbind(3), patch_rows.unbind(3), strict=True):
            # From the last column to the first: each pixel adds in the order of its places in the patches.
            for view, part in zip(row_views.unbind(2)[::-1], row.unbind(2)[::-1], strict=True):
                view.add_(part)
        return total.view(ctx.shape).to(gradient.dtype), None, None
