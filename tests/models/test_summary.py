"""The layers of models whose modules are nested, repeated, shared or not called."""

import torch
from torch import Tensor, nn

from distributed_mnist.config import MNIST_SHAPE
from distributed_mnist.models.build import build
from distributed_mnist.models.summary import Layer, layers_of
from distributed_mnist.models.zoo import MODELS

CPU = torch.device("cpu")


class Odd(nn.Module):
    """One layer called twice, one twice in the model, one that is never called, one with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.twice = nn.Linear(784, 784)
        self.inner = nn.ModuleDict({"a": nn.Linear(784, 10, bias=False), "unused": nn.Linear(2, 1)})
        self.again = self.inner["a"]
        assert isinstance(self.again, nn.Linear)
        self.tied = nn.Linear(784, 10)
        self.tied.weight = self.again.weight
        self.recurrent = nn.GRU(784, 4, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.twice(self.twice(images.flatten(1)))
        self.recurrent(pixels.unsqueeze(1))
        return self.again(pixels) + self.tied(pixels) * self.scale.sum()


def test_a_model_with_odd_layers() -> None:
    model = Odd()
    layers = layers_of(model, MNIST_SHAPE, CPU)
    assert layers == [
        Layer("", "Odd", (None, 10), 3, 1),
        Layer("twice", "Linear", (None, 784), 784 * 785, 2),
        Layer("inner", "ModuleDict", None, 0, 0),
        Layer("inner.a", "Linear", (None, 10), 7840, 1),
        Layer("inner.unused", "Linear", None, 3, 0),
        Layer("tied", "Linear", (None, 10), 10, 1),  # its weight counts where it comes first
        Layer("recurrent", "GRU", (None, 1, 4), sum(p.numel() for p in model.recurrent.parameters()), 1),
    ]
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_parameters_of_our_models_add_up() -> None:
    for name in MODELS:
        model = build(name, 10, seed=0)
        layers = layers_of(model, MNIST_SHAPE, CPU)
        assert layers[0].output == (None, 10)
        assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())


def test_rows_that_are_positions_of_images() -> None:
    layers = {layer.name: layer for layer in layers_of(MODELS["cnn-small"](10), MNIST_SHAPE, CPU)}
    assert layers["layers.0"].output == (None, 10, 10, 16)
    assert layers["layers.0.product"].output == (None, 100, 16)


class Constant(nn.Linear):
    """Its output has no images."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight


def test_an_output_without_images() -> None:
    layers = layers_of(Constant(5, 3), MNIST_SHAPE, CPU)
    assert layers[0].output == (3, 5)
