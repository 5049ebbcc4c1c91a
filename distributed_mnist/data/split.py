"""Labelled images on a rank's device, and how pixels become a network's input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Labelled images on a device: uint8 `(n, 28, 28)` and uint8 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Pixels `(m, 28, 28)` of 0 to 255 to float32 `(m, 1, 28, 28)`: as a fraction, less mean, over std."""
    return images.unsqueeze(1).to(torch.float32, copy=True).mul_(1 / (255 * std)).sub_(mean / std)
