"""The networks. Each maps normalised images `(n, channels, h, w)` to logits `(n, classes)`.

Images have any size, in grey or in colour. The stated numbers of parameters are those for MNIST.

No layer may mix samples: with batch statistics the result would depend on how a batch is cut into shards.
`build.inspect` tests whether a model obeys this rule.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MNIST_SHAPE, ImageShape
from ..exact.functions import are_exact
from .multi_crop import five_crops
from .patch_conv import PatchConv

_LEAST_SIDE = 20
"""The least height and width that all convolutions here can take."""


class Linear(nn.Module):
    """One linear layer on the pixels, named `fc` as in the original script: 7,850 parameters."""

    def __init__(self, classes: int, shape: ImageShape = MNIST_SHAPE) -> None:
        super().__init__()
        self.fc = NarrowLinear(math.prod(shape), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, channels, h, w)`."""
        return self.fc(images.flatten(1))


class NarrowLinear(nn.Linear):
    """A linear layer with few outputs. On CPU, weight times samples takes half as long as the reverse."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `(n, in)` to `(n, out)`."""
        if are_exact():  # exact arithmetic has layers of its own
            return super().forward(input)
        return torch.addmm(self.bias.unsqueeze(1), self.weight, input.t()).t()


class Enlarged(nn.Module):
    """Repeats the rows and columns of images with a side below `_LEAST_SIDE`, all equally often.

    `shape` is then that of its results.
    """

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        channels, height, width = shape
        self.times = -(-_LEAST_SIDE // min(height, width, _LEAST_SIDE))
        self.shape: ImageShape = (channels, height * self.times, width * self.times)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(n, channels, h, w)` to `(n, *shape)`."""
        if self.times == 1:
            return images
        n, channels, height, width = images.shape
        repeated = images[:, :, :, None, :, None].expand(-1, -1, -1, self.times, -1, self.times)
        return repeated.reshape(n, channels, height * self.times, width * self.times)


def mlp(classes: int, shape: ImageShape = MNIST_SHAPE) -> nn.Module:
    """Two hidden layers of 256 units: 269,322 parameters for ten classes."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(classes: int, shape: ImageShape = MNIST_SHAPE) -> nn.Module:
    """Two convolutions with pooling, and one hidden layer: 215,194 parameters for ten classes."""
    enlarged = Enlarged(shape)
    channels, height, width = enlarged.shape
    pooled = [((side - 4) // 2 - 2) // 2 for side in (height, width)]
    layers = nn.Sequential(
        nn.Conv2d(channels, 24, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pooling: the same numbers for a quarter of the work
        nn.Conv2d(24, 32, kernel_size=3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * math.prod(pooled), 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )
    return layers if enlarged.times == 1 else nn.Sequential(enlarged, *layers)


class CnnSmall(nn.Module):
    """Three convolutions on the middle 23 by 23 pixels: 26,762 parameters for ten classes.

    Images of another size are cropped by as many pixels.
    The first layers have large strides and few channels, so that little is computed where there are many
    pixels. The convolutions are matrix products (`patch_conv`). Orthogonal initial weights keep signals and
    gradients at one size (Saxe and others, 2014). The last layer starts at zero, so that all classes first
    have the same probability. In evaluation the model returns the mean logits of five crops (`multi_crop`).
    """

    def __init__(self, classes: int, shape: ImageShape = MNIST_SHAPE) -> None:
        super().__init__()
        self.enlarged = Enlarged(shape)
        channels, height, width = self.enlarged.shape
        rows, columns = (((side - 5 - 5) // 2 + 1) // 2 - 2 for side in (height, width))
        self.layers = nn.Sequential(
            PatchConv(channels, 16, 5, stride=2),
            nn.ReLU(),
            PatchConv(16, 32, 2, stride=2),
            nn.ReLU(),
            PatchConv(32, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * rows * columns, classes),
        )
        _initialise(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, channels, h, w)`."""
        pixels = self.enlarged(images).permute(0, 2, 3, 1)
        if self.training:
            return self.layers(pixels[:, 2:-3, 2:-3])
        return five_crops(self.layers, pixels[:, 1:-2, 1:-2], (1, 2))


class CnnLarge(nn.Module):
    """Five convolutions, the first with a large stride: 298,538 parameters for ten classes.

    It is initialised and evaluated as `CnnSmall` is. For the crops, the outermost pixels are repeated once
    around the image.
    """

    def __init__(self, classes: int, shape: ImageShape = MNIST_SHAPE) -> None:
        super().__init__()
        self.enlarged = Enlarged(shape)
        channels, height, width = self.enlarged.shape
        rows, columns = ((side // 2 - 2 - 4) // 2 for side in (height, width))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 6, stride=2),
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
            nn.Linear(128 * rows * columns, classes),
        )
        _initialise(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, channels, h, w)`."""
        images = self.enlarged(images)
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


MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "mlp": mlp,
    "cnn": cnn,
    "cnn-small": CnnSmall,
    "cnn-large": CnnLarge,
}
