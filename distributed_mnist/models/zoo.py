"""The networks. Each maps normalised images `(n, 1, 28, 28)` to logits `(n, classes)`.

No layer may mix samples: with batch statistics the result would depend on how a batch is cut into shards.
`inspect` tests whether a model obeys this rule, and whether it draws random numbers (dropout).
"""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.random_keys import torch_seed
from ..common.suggest import unknown
from ..errors import UsageError
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


@dataclass(frozen=True)
class ModelProperties:
    """The properties of a model that `inspect` measures."""

    parameters: int
    """How many numbers are trained."""
    draws_random_numbers: bool
    unused: tuple[str, ...]
    """Names of the parameters that the logits do not depend on."""


def build(name: str, classes: int, seed: int) -> nn.Module:
    """Build a model on the CPU. Its initial weights depend on `seed` alone.

    `name` is one of `MODELS` or `package.module:factory`, where `factory(classes)` returns a module.
    Raises `UsageError` if there is no such factory or if it fails.
    """
    factory = find_factory(name)
    torch.manual_seed(torch_seed("init", seed))
    try:
        model = factory(classes)
    except Exception as error:
        raise UsageError(f"--model {name}: its factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model {name}: the factory returned a {type(model).__name__}, not a torch module"
        )
    return model


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device and its convolutions' weights to channels-last layout.

    On CPU this layout is twice as fast. It decides which kernels run, and so the last bits. Therefore all
    code that runs a model must use this function.
    """
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def temporary_model(name: str, factory: Callable[[int], Any]) -> Iterator[None]:
    """Make `name` a model inside this context, for a factory that cannot be imported."""
    before = dict(MODELS)
    MODELS[name] = factory
    try:
        yield
    finally:
        MODELS.clear()
        MODELS.update(before)


def find_factory(name: str) -> Callable[[int], Any]:
    """Return the function that makes models of this name. Raises `UsageError` if there is none."""
    if name in MODELS:
        return MODELS[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(unknown("model", name, MODELS, ", or package.module:factory"))
    current_folder = str(Path.cwd())
    if current_folder not in sys.path:  # an installed script like `dmnist` lacks it, unlike `python -m`
        sys.path.append(current_folder)
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UsageError(f"--model {name}: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise UsageError(f"--model {name}: {attribute} is not callable")
    return factory  # `build` checks what it returns


@torch.no_grad()
def inspect(model: nn.Module, name: str, classes: int, device: torch.device) -> ModelProperties:
    """Run a model on random images and return its properties.

    Raises `UsageError` if it cannot be trained exactly. This tests what the model does, not which types its
    layers have. So it also finds batch statistics or functional dropout in a user's own code.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--model {name}: it has no parameters to train")
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(1, *IMAGE_SHAPE, generator=generator).to(device) for _ in range(3))
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model.train()

    def forward(*images: Tensor) -> Tensor:
        torch.manual_seed(0)
        try:
            return model(torch.cat(images))
        except Exception as error:
            shape = (len(images), *IMAGE_SHAPE)
            raise UsageError(f"--model {name}: it fails on images {shape}: {error}") from error

    torch.manual_seed(0)
    state_before = _generator_state(device)
    logits = forward(first, second)
    draws_random_numbers = not torch.equal(state_before, _generator_state(device))
    if not isinstance(logits, Tensor):
        raise UsageError(f"--model {name}: it returns a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != (2, classes):
        raise UsageError(
            f"--model {name}: it returns shape {tuple(logits.shape)} for 2 images, not (2, {classes}): "
            f"the data has {classes} classes"
        )
    changed = [key for key, value in model.named_buffers() if not torch.equal(value, buffers[key])]
    mixes_samples = not torch.equal(logits[0], forward(first, third)[0])
    if mixes_samples or changed:
        problem = "one image's logits depend on the others in its batch"
        if changed:
            problem = f"its buffer {changed[0]} changes in the forward pass"
        raise UsageError(
            f"--model {name}: {problem}; batch statistics cannot be trained exactly, use per-sample norms"
        )
    model.eval()
    state_before = _generator_state(device)
    pair = torch.cat((first, second))
    if not torch.equal(model(pair), model(pair)) or not torch.equal(state_before, _generator_state(device)):
        raise UsageError(f"--model {name}: it draws random numbers in evaluation")
    model.train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        total = forward(first, second).float().sum()
        if not total.requires_grad:
            raise UsageError(f"--model {name}: its logits do not depend on its parameters")
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = tuple(key for key, gradient in zip(trained, gradients, strict=True) if gradient is None)
    return ModelProperties(sum(p.numel() for p in trained.values()), draws_random_numbers, unused)


def _generator_state(device: torch.device) -> Tensor:
    """Return the state of the global generator from which layers on this device draw."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
