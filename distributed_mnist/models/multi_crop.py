"""A network's answer from several looks at an image: their mean logits.

After Krizhevsky and others, "ImageNet classification with deep convolutional neural networks", 2012.
"""

import torch
from torch import Tensor, nn


def five_crops(layers: nn.Module, images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Mean logits, float32, of the middle of the images and of four crops one pixel off it: above, below,
    to the left and to the right.

    `images` are two pixels larger than what `layers` takes, in the dimensions `sides`.
    """
    height, width = (images.shape[side] - 2 for side in sides)
    corners = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    crops = (images.narrow(sides[0], y, height).narrow(sides[1], x, width) for y, x in corners)
    return torch.stack([layers(crop).float() for crop in crops]).mean(0)  # a mean in bf16 is full of ties
