"""The networks. Each maps normalised images `(n, 1, 28, 28)` to logits `(n, classes)`.

No layer may mix samples: with batch statistics the result would depend on how a batch is cut into shards.
`build.inspect` tests whether a model obeys this rule.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .multi_crop import five_crops
from .patch_conv import PatchConv

IMAGE_SHAPE = (1, 28, 28)


class Linear(nn.Module):
    """One linear layer on the pixels, named `fc` as in the original script: 7,850 parameters."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = NarrowLinear(28 * 28, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, 1, 28, 28)`."""
        return self.fc(images.flatten(1))


class NarrowLinear(nn.Linear):
    """A linear layer with few outputs. On CPU, weight times samples takes half as long as the reverse."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `(n, in)` to `(n, out)`."""
        return torch.addmm(self.bias.unsqueeze(1), self.weight, input.t()).t().contiguous()


def mlp(classes: int) -> nn.Module:
    """Two hidden layers of 256 units: 269,322 parameters for ten classes."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(classes: int) -> nn.Module:
    """Two convolutions with pooling, and one hidden layer: 215,194 parameters for ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 24, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pooling: the same numbers for a quarter of the work
        nn.Conv2d(24, 32, kernel_size=3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


class CnnSmall(nn.Module):
    """Three convolutions on the middle 23 by 23 pixels: 26,762 parameters for ten classes.

    The first layers have large strides and few channels, so that little is computed where there are many
    pixels. The convolutions are matrix products (`patch_conv`). Orthogonal initial weights keep signals and
    gradients at one size (Saxe and others, 2014). The last layer starts at zero, so that all classes first
    have the same probability. In evaluation the model returns the mean logits of five crops (`multi_crop`).
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            PatchConv(1, 16, 5, stride=2),
            nn.ReLU(),
            PatchConv(16, 32, 2, stride=2),
            nn.ReLU(),
            PatchConv(32, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, classes),
        )
        _initialise(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, 1, 28, 28)`."""
        pixels = images.squeeze(1).unsqueeze(3)
        if self.training:
            return self.layers(pixels[:, 2:25, 2:25])
        return five_crops(self.layers, pixels[:, 1:26, 1:26], (1, 2))


class CnnLarge(nn.Module):
    """Five convolutions, the first with a large stride: 298,538 parameters for ten classes.

    It is initialised and evaluated as `CnnSmall` is. For the crops, the outermost pixels are repeated once
    around the image.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 6, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, classes),
        )
        _initialise(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, 1, 28, 28)`."""
        if self.training:
            return self.layers(images)
        return five_crops(self.layers, F.pad(images, (1, 1, 1, 1), mode="replicate"), (2, 3))


def _initialise(layers: nn.Sequential) -> None:
    """Set orthogonal weights, scaled for the ReLUs after them; zero the last layer and all biases."""
    for layer in layers.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.get_parameter("bias"))
    nn.init.zeros_(layers[-1].get_parameter("weight"))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "linear": Linear,
    "mlp": mlp,
    "cnn": cnn,
    "cnn-small": CnnSmall,
    "cnn-large": CnnLarge,
}
