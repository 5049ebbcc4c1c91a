"""Evaluate a network on several crops of each image and average the logits.

After Krizhevsky and others, "ImageNet classification with deep convolutional neural networks", 2012.
"""

import torch
from torch import Tensor, nn


def five_crops(layers: nn.Module, images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the mean logits, float32, of five crops: the centre, and one pixel up, down, left and right.

    `sides` are the dimensions of height and width. In both, `images` are two pixels larger than what
    `layers` takes.
    """
    height, width = (images.shape[side] - 2 for side in sides)
    offsets = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    crops = (images.narrow(sides[0], y, height).narrow(sides[1], x, width) for y, x in offsets)
    return torch.stack([layers(crop).float() for crop in crops]).mean(0)  # bf16 means would have many ties
