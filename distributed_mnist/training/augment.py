"""Shift, rotate and zoom whole batches at random: `(images, key) -> images`, pure functions.

The parameters of a step are drawn for its whole global batch, four numbers per image, and each rank takes
its own rows. So an image is distorted in the same way regardless of its rank and shard.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..common.random_keys import random_bits, uniform
from ..config import ImageShape, Recipe
from ..exact.elementary import sin_and_cos


def draw_transforms(recipe: Recipe, step: int, count: int, shape: ImageShape) -> NDArray[np.float32] | None:
    """Draw the maps from output to input coordinates for the `count` images of a step.

    Returns float32 `(count, 2, 3)` in the form that `torch.nn.functional.affine_grid` takes, or None if
    the recipe has no augmentation.
    """
    if not recipe.distorts():
        return None
    draws = uniform(random_bits(4 * count, "augment", recipe.seed, step)).reshape(count, 4) * 2 - 1
    angle = draws[:, 0] * math.radians(recipe.rotate)
    if recipe.precision == "exact":  # NumPy's functions differ between processors in the last bit
        sine, cosine = (part.numpy() for part in sin_and_cos(torch.from_numpy(angle)))
    else:
        sine, cosine = np.sin(angle), np.cos(angle)
    zoom = 1 + draws[:, 1] * recipe.scale
    _, height, width = shape
    transforms = np.zeros((count, 2, 3), dtype=np.float32)
    # Coordinates run from -1 to 1 across the image, so a pixel is 2 / width or 2 / height.
    transforms[:, 0, 0] = transforms[:, 1, 1] = cosine / zoom
    transforms[:, 0, 1] = -sine / zoom * (height / width)
    transforms[:, 1, 0] = sine / zoom * (width / height)
    transforms[:, 0, 2] = draws[:, 2] * recipe.shift * 2 / width
    transforms[:, 1, 2] = draws[:, 3] * recipe.shift * 2 / height
    return transforms


def apply_transforms(images: Tensor, transforms: Tensor) -> Tensor:
    """Resample float images `(n, channels, h, w)` bilinearly; pixels from outside are 0, the background.

    `exact.resampling.resample` does the same for `--precision exact`.
    """
    if not len(images):  # affine_grid refuses an empty batch
        return images
    grid = F.affine_grid(transforms, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
