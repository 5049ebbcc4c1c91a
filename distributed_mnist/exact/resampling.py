"""Resample images bilinearly, with the same bits on every machine."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resample(images: Tensor, transforms: Tensor) -> Tensor:
    """Return float32 images `(n, channels, h, w)`, distorted; pixels from outside are 0, the background.

    `transforms` `(n, 2, 3)` are those of `torch.nn.functional.affine_grid`: they map output to input
    coordinates, which run from -1 to 1 across the image. Results differ from those of `grid_sample` by
    rounding only. A position in pixels has an error of about 1e-6 times the image's side.
    """
    n, channels, height, width = images.shape
    columns = _from_middle(width, images.device)
    rows = _from_middle(height, images.device).unsqueeze(1)
    a, b, c, d, e, f = transforms.to(torch.float64).view(n, 6, 1, 1).unbind(1)
    x = _sum(a * columns + (c * (width / 2) + (width - 1) / 2), b * rows * (width / height), width)
    y = _sum(d * columns * (height / width) + (f * (height / 2) + (height - 1) / 2), e * rows, height)
    left, top = x.floor(), y.floor()
    x -= left
    y -= top
    # A border of zeros holds what is outside. The pixel in row r and column c of an image is then at
    # (r + 1) * stride + c + 1.
    padded = F.pad(images, (1, 2, 1, 2)).flatten(2)
    stride = width + 3
    index = top.to(torch.int64).add_(1).mul_(stride).add_(left.to(torch.int64)).add_(1)
    index = index.flatten(1).unsqueeze(1).expand(n, channels, height * width)

    def corner(offset: int) -> Tensor:
        return padded[..., offset:].gather(2, index).view(n, channels, height, width)

    x, y = x.unsqueeze(1), y.unsqueeze(1)
    upper = _between(corner(0), corner(1), x)
    lower = _between(corner(stride), corner(stride + 1), x)
    return _between(upper, lower, y)


def _from_middle(size: int, device: torch.device) -> Tensor:
    """Return the distances of pixels' centres from the middle, in pixels: exact halves, float64."""
    return torch.arange(size, dtype=torch.float64, device=device).sub_((size - 1) / 2)


def _sum(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Return positions in float32, moved to the border of zeros if they are further outside."""
    return (first.to(torch.float32) + second.to(torch.float32)).clamp_(-1, size)


def _between(first: Tensor, second: Tensor, place: Tensor) -> Tensor:
    """Return `first + (second - first) * place`, in the memory of `second`."""
    return second.sub_(first).mul_(place).add_(first)
