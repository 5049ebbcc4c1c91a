"""Convert the images that a caller passes to a network to pixels, or refuse them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

SIDE = 28
_WANTED = (
    "images must be pixels from 0 to 255, or floats from 0 to 1, of shape (n, 28, 28), (n, 1, 28, 28) or "
    "(28, 28), white on black"
)


def as_pixels(images: Any) -> Tensor:
    """Return images as pixels, uint8 `(n, 28, 28)`, on the device that they are on.

    `images` is a tensor, an array, a PIL image, or a sequence of these, of shape `(n, 28, 28)`,
    `(n, 1, 28, 28)`, or `(28, 28)` for one image. Integers are pixels from 0 to 255. Floats are pixels from
    0 to 1, as torchvision's `ToTensor` makes them, and are rounded to 256 levels. Raises `DataError` for
    anything else.
    """
    values = _as_tensor(images)
    shape = tuple(values.shape)
    if shape[1:] == (1, SIDE, SIDE):
        values = values.squeeze(1)
    elif shape == (SIDE, SIDE):
        values = values.unsqueeze(0)
    elif shape[1:] != (SIDE, SIDE):
        raise DataError(f"{_WANTED}; not of shape {shape}")
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool or values.is_complex():
        raise DataError(f"{_WANTED}; not {_name(values.dtype)}")
    is_float = values.is_floating_point()
    wide = values.float()
    low, high = (float(wide.min()), float(wide.max())) if wide.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= (1 if is_float else 255)):  # also for NaN
        hint = "; do not normalise them, because that is done here" if is_float and low < 0 else ""
        raise DataError(f"{_WANTED}; not {_name(values.dtype)} from {low:g} to {high:g}{hint}")
    return (wide * 255).round().byte() if is_float else wide.byte()


def _as_tensor(images: Any) -> Tensor:
    """Return what the caller passed as a tensor. Raises `DataError`."""
    if isinstance(images, Tensor):
        if images.layout != torch.strided or images.is_quantized or images.is_meta:
            raise DataError(f"{_WANTED}; not a sparse, quantised or meta tensor")
        return images.detach()
    try:
        if isinstance(images, list | tuple):  # maybe of tensors on a device
            images = [image.detach().cpu() if isinstance(image, Tensor) else image for image in images]
        array = np.asarray(images)
        if array.dtype.kind not in "biufc":
            raise TypeError
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{_WANTED}; not this {type(images).__name__}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
