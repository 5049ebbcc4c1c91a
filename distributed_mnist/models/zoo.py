"""The networks. Each takes normalised images `(n, 1, 28, 28)` and gives logits `(n, classes)`.

No layer may mix samples: batch statistics would make the answer depend on how a batch is cut.
`inspect` finds out whether a model keeps to that, and whether it draws random numbers (dropout).
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
        self.fc = Narrow(28 * 28, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` of images `(n, 1, 28, 28)`."""
        return self.fc(images.flatten(1))


class Narrow(nn.Linear):
    """A linear layer of few outputs: written as weight times samples it takes half the time on CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """`(n, in)` to `(n, out)`."""
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
    """Two convolutions, each pooled, and one hidden layer: 215,194 parameters for ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 24, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pooling: the same numbers, a quarter of the work
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

    Large strides and few channels at first, so that little is computed where there are many places; written
    as products of matrices (`patches`). Orthogonal weights keep the first signals and gradients at one size
    (Saxe and others, 2014); a last layer of zeros begins from even odds. In evaluation it gives the mean
    logits of five crops (`crops`).
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

    Initialised and evaluated as `CnnSmall` is; around the image its outermost pixels are repeated once, for
    the crops.
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
    """Orthogonal weights, scaled for the ReLUs behind them; zeros in the last layer and in all biases."""
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
class Traits:
    """What `inspect` found out about a model."""

    parameters: int
    draws_random_numbers: bool
    unused: tuple[str, ...]
    """Parameters that the logits do not depend on."""


def build(name: str, classes: int, seed: int) -> nn.Module:
    """A model on the CPU, its initial weights decided by `seed` alone.

    `name` is one of `MODELS` or `package.module:factory`, where `factory(classes)` returns a module.
    Raises `UsageError` where there is no such factory or it fails.
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
    """The model on a device, its convolutions' weights with channels last: on CPU twice as fast.

    The layout chooses kernels, and so the last bits: whatever runs a model places it with this.
    """
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def known_as(name: str, factory: Callable[[int], Any]) -> Iterator[None]:
    """Within it, `name` is a model: for a function that cannot be imported."""
    before = dict(MODELS)
    MODELS[name] = factory
    try:
        yield
    finally:
        MODELS.clear()
        MODELS.update(before)


def find_factory(name: str) -> Callable[[int], Any]:
    """The function that makes models of this name. Raises `UsageError` if there is none."""
    if name in MODELS:
        return MODELS[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(unknown("model", name, MODELS, ", or package.module:factory"))
    here = str(Path.cwd())
    if here not in sys.path:  # `dmnist` is an installed script: unlike `python -m`, it leaves this out
        sys.path.append(here)
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UsageError(f"--model {name}: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise UsageError(f"--model {name}: {attribute} is not callable")
    return factory  # what it returns is looked at by `build`


@torch.no_grad()
def inspect(model: nn.Module, name: str, classes: int, device: torch.device) -> Traits:
    """Try a model on made-up images. Raises `UsageError` if it cannot be trained exactly.

    Looks at what the model does rather than at the types of its layers, so that a user's own batch
    statistics or functional dropout is found as well.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--model {name}: it has no parameters to train")
    noise = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(1, *IMAGE_SHAPE, generator=noise).to(device) for _ in range(3))
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
    seeded = _generator_state(device)
    logits = forward(first, second)
    draws = not torch.equal(seeded, _generator_state(device))
    if not isinstance(logits, Tensor):
        raise UsageError(f"--model {name}: it returns a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != (2, classes):
        raise UsageError(
            f"--model {name}: it gives {tuple(logits.shape)} for 2 images, not (2, {classes}): "
            f"the data has {classes} classes"
        )
    changed = [key for key, value in model.named_buffers() if not torch.equal(value, buffers[key])]
    mixes = not torch.equal(logits[0], forward(first, third)[0])
    if mixes or changed:
        why = "one image's logits depend on the others in its batch"
        if changed:
            why = f"its buffer {changed[0]} changes in the forward pass"
        raise UsageError(
            f"--model {name}: {why}; batch statistics cannot be trained exactly, use per-sample norms"
        )
    model.eval()
    before = _generator_state(device)
    pair = torch.cat((first, second))
    if not torch.equal(model(pair), model(pair)) or not torch.equal(before, _generator_state(device)):
        raise UsageError(f"--model {name}: it draws random numbers in evaluation")
    model.train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        total = forward(first, second).float().sum()
        if not total.requires_grad:
            raise UsageError(f"--model {name}: its logits do not depend on its parameters")
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = tuple(key for key, gradient in zip(trained, gradients, strict=True) if gradient is None)
    return Traits(sum(p.numel() for p in trained.values()), draws, unused)


def _generator_state(device: torch.device) -> Tensor:
    """The state of the global generator that layers on this device draw from."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
