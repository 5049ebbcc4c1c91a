"""Hold labelled images on a rank's device, and normalise pixels to a network's input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Labelled images on a device: images uint8 `(n, 28, 28)`, labels uint8 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Convert pixels from 0 to 255 to a network's input: `(pixel / 255 - mean) / std`.

    `(m, 28, 28)` becomes float32 `(m, 1, 28, 28)`.
    """
    return images.unsqueeze(1).to(torch.float32, copy=True).mul_(1 / (255 * std)).sub_(mean / std)
