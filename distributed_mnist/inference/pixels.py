"""Convert the images that a caller passes to a network to pixels, or refuse them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MNIST_SHAPE, ImageShape, stored_shape
from ..data.split import as_stored
from ..errors import DataError


def as_pixels(images: Any, shape: ImageShape = MNIST_SHAPE) -> Tensor:
    """Return images as pixels, uint8 `(n, h, w)` or in colour `(n, h, w, 3)`, on their own device.

    `images` is a tensor, an array, a PIL image, or a sequence of these. `shape` is that of one image. They
    are `(n, h, w)` or `(n, h, w, 3)`, or torch's `(n, channels, h, w)`; without `n` for one image. Integers
    are pixels from 0 to 255. Floats are pixels from 0 to 1, as torchvision's `ToTensor` makes them, and are
    rounded to 256 levels. Raises `DataError` for anything else.
    """
    wanted, stored = _wanted(shape), stored_shape(shape)
    values = _as_tensor(images, wanted)
    given = tuple(values.shape)
    if given in (stored, shape):
        values = values.unsqueeze(0)
    if values.shape[1:] == shape != stored:
        values = as_stored(values)
    elif values.shape[1:] != stored:
        raise DataError(f"{wanted}; not of shape {given}")
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool or values.is_complex():
        raise DataError(f"{wanted}; not {_name(values.dtype)}")
    is_float = values.is_floating_point()
    wide = values.float()
    low, high = (float(wide.min()), float(wide.max())) if wide.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= (1 if is_float else 255)):  # also for NaN
        hint = "; do not normalise them, because that is done here" if is_float and low < 0 else ""
        raise DataError(f"{wanted}; not {_name(values.dtype)} from {low:g} to {high:g}{hint}")
    return (wide * 255).round().byte() if is_float else wide.byte()


def _wanted(shape: ImageShape) -> str:
    channels, height, width = shape
    one = f"{height}, {width}" if channels == 1 else f"{height}, {width}, {channels}"
    shapes = f"(n, {one}), (n, {channels}, {height}, {width}) or ({one})"
    look = ", white on black" if shape == MNIST_SHAPE else ""
    return f"images must be pixels from 0 to 255, or floats from 0 to 1, of shape {shapes}{look}"


def _as_tensor(images: Any, wanted: str) -> Tensor:
    """Return what the caller passed as a tensor. Raises `DataError`."""
    if isinstance(images, Tensor):
        if images.layout != torch.strided or images.is_quantized or images.is_meta:
            raise DataError(f"{wanted}; not a sparse, quantised or meta tensor")
        return images.detach()
    try:
        if isinstance(images, list | tuple):  # maybe of tensors on a device
            images = [image.detach().cpu() if isinstance(image, Tensor) else image for image in images]
        array = np.asarray(images)
        if array.dtype.kind not in "biufc":
            raise TypeError
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{wanted}; not this {type(images).__name__}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
