"""Convolutions written as products of matrices, the form in which small ones run fastest on a CPU.

A convolution multiplies every `k` by `k` patch of its input with one matrix. Here the patches are copied
out first, one a row, and the product is an ordinary linear layer: for a few channels that beats a library's
convolution, and each shard's gradient of the weights is a product too (`shardwise`).
"""

from typing import Any

import torch
from torch import Tensor, nn


class PatchConv(nn.Module):
    """A convolution without padding. `(n, h, w, c)` to `(n, (h-k)//s + 1, (w-k)//s + 1, out)`.

    Its weight is that of the linear layer inside, `(out, k*k*c)`: row, column, channel of the patch.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.product = nn.Linear(kernel * kernel * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        device = x.device.type
        if torch.is_autocast_enabled(device):  # before each value is copied into several patches
            x = x.to(torch.get_autocast_dtype(device))
        rows, columns = ((side - self.kernel) // self.stride + 1 for side in x.shape[1:3])
        return self.product(patches(x, self.kernel, self.stride)).view(x.shape[0], rows, columns, -1)


def patches(x: Tensor, kernel: int, stride: int) -> Tensor:
    """All patches of images `(n, h, w, c)` as rows, `(n * rows * columns, kernel * kernel * c)`."""
    n, height, width, channels = x.shape
    if kernel == stride and height % kernel == width % kernel == 0:  # they tile it: a change of order
        tiles = x.reshape(n, height // kernel, kernel, width // kernel, kernel * channels)
        return tiles.transpose(2, 3).reshape(-1, kernel * kernel * channels)
    if x.requires_grad:
        return _Patches.apply(x, kernel, stride)  # type: ignore[no-any-return]
    return _copied(x, kernel, stride)


def _copied(x: Tensor, kernel: int, stride: int) -> Tensor:
    views = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (n, rows, columns, c, kernel, kernel)
    size = kernel * kernel * x.shape[3]
    if (
        x.shape[3] == 1
    ):  # rows of a few pixels copy slowly: pixel by pixel of all patches, long rows, is faster
        return views.permute(4, 5, 3, 0, 1, 2).reshape(size, -1).t()
    return views.permute(0, 1, 2, 4, 5, 3).reshape(-1, size)


class _Patches(torch.autograd.Function):
    """`_copied`, with a backward pass that adds whole slices: torch's own goes pixel by pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        return _copied(x, kernel, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (n, height, width, channels), kernel, stride = ctx.shape, ctx.kernel, ctx.stride
        rows, columns = ((side - kernel) // stride + 1 for side in (height, width))
        pieces = gradient.view(n, rows, columns, kernel, kernel, channels)
        total = gradient.new_zeros((n, height, width, channels), dtype=torch.float32)
        for i in range(kernel):
            for j in range(kernel):
                below, right = i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1
                total[:, i:below:stride, j:right:stride] += pieces[:, :, :, i, j]
        return total.to(gradient.dtype), None, None
