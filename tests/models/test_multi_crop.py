"""Test where the crops of an image are, and that their logits are averaged."""

import pytest
import torch
from torch import Tensor, nn

from distributed_mnist.models.build import build
from distributed_mnist.models.multi_crop import five_crops

IMAGES = torch.arange(2 * 6 * 7, dtype=torch.float32).view(2, 1, 6, 7)


class Seen(nn.Module):
    """Records its inputs and returns one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.crops: list[Tensor] = []

    def forward(self, crop: Tensor) -> Tensor:
        self.crops.append(crop.clone())
        return crop.flatten(1)[:, :1]


def shifted(right: int, down: int) -> Tensor:
    return IMAGES[:, :, 1 + down : 5 + down, 1 + right : 6 + right]


FIVE = [shifted(0, 0), shifted(0, -1), shifted(0, 1), shifted(-1, 0), shifted(1, 0)]


def test_five_crops_are_the_middle_and_one_pixel_to_each_side() -> None:
    seen = Seen()
    logits = five_crops(seen, IMAGES, (2, 3))
    assert len(seen.crops) == 5
    for crop, expected in zip(seen.crops, FIVE, strict=True):
        assert torch.equal(crop, expected)
    assert torch.equal(logits, torch.stack([crop[:, 0, 0, :1] for crop in FIVE]).mean(0))


def test_the_mean_is_not_rounded_to_what_the_network_computes_in() -> None:
    """1 and 1 + 2**-7 are neighbours in bf16, so their mean over five crops is not a bf16 number."""

    class Half(nn.Module):
        def forward(self, crop: Tensor) -> Tensor:
            return crop[:, 0, :1, 0].bfloat16()

    images = torch.ones(1, 1, 6, 7)
    images[..., 1, 1] += 2**-7
    logits = five_crops(Half(), images, (2, 3))
    assert logits.dtype == torch.float32
    assert logits.item() == pytest.approx(1 + 2**-7 / 5)


@pytest.mark.parametrize("name", ["cnn-small", "cnn-large"])
def test_networks_look_five_times_in_evaluation_only(name: str) -> None:
    model = build(name, 10, 0)
    calls: list[int] = []
    layers = model.get_submodule("layers")
    layers.register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(3, 1, 28, 28)
    assert model.train()(images).shape == model.eval()(images).shape == (3, 10)
    assert len(calls) == 1 + 5


@pytest.mark.parametrize("name", ["cnn-small", "cnn-large"])
def test_an_image_that_is_the_same_all_over_looks_the_same_from_everywhere(name: str) -> None:
    model = build(name, 10, 0)
    for parameter in model.parameters():  # the last layer begins with zeros
        nn.init.normal_(parameter, std=0.1)
    images = torch.full((2, 1, 28, 28), 0.5)
    assert torch.allclose(model.train()(images), model.eval()(images), atol=1e-5)
