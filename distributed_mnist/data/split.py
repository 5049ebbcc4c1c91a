"""Hold labelled images on a rank's device, and normalise pixels to a network's input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ImageShape, shape_of


@dataclass(frozen=True)
class Split:
    """Labelled images on a device, uint8: images `(n, h, w)` or in colour `(n, h, w, 3)`, labels `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of an image."""
        return shape_of(self.images.shape)


def channels_first(images: Tensor) -> Tensor:
    """Return a view `(n, channels, h, w)` of images `(n, h, w)` or `(n, h, w, 3)`."""
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def as_stored(images: Tensor) -> Tensor:
    """Return a view `(n, h, w)` or `(n, h, w, 3)` of images `(n, channels, h, w)`."""
    return images.squeeze(1) if images.shape[1] == 1 else images.permute(0, 2, 3, 1)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Convert pixels from 0 to 255 to a network's input: `(pixel / 255 - mean) / std`.

    `(m, h, w)` becomes float32 `(m, 1, h, w)`, and `(m, h, w, 3)` becomes `(m, 3, h, w)`, contiguous.
    """
    pixels = channels_first(images).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return pixels.mul_(1 / (255 * std)).sub_(mean / std)
