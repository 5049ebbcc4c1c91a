"""Test shifts, rotations and zooms against pixels moved by hand; they depend on (seed, step) alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distributed_mnist.common.digest import digest
from distributed_mnist.common.random_keys import random_bits, uniform
from distributed_mnist.config import MNIST_SHAPE, ImageShape, Recipe
from distributed_mnist.data.split import Split
from distributed_mnist.exact.resampling import resample
from distributed_mnist.training.augment import apply_transforms, draw_transforms
from distributed_mnist.training.batches import Batches

NOISE = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 1, 28, 28)).astype(np.float32))


Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BOTH_WAYS = pytest.mark.parametrize("apply", [apply_transforms, resample])


def affine(*rows: list[float]) -> torch.Tensor:
    """Return one map for all three images of the noise."""
    return torch.tensor(rows, dtype=torch.float32).expand(3, 2, 3).contiguous()


def drawn(recipe: Recipe, step: int = 0, count: int = 5000, shape: ImageShape = MNIST_SHAPE) -> Any:
    transforms = draw_transforms(recipe, step, count, shape)
    assert transforms is not None
    assert transforms.dtype == np.float32
    assert transforms.shape == (count, 2, 3)
    return transforms


def test_nothing_is_drawn_where_nothing_is_asked_for() -> None:
    assert draw_transforms(Recipe(), 0, 10, MNIST_SHAPE) is None


@BOTH_WAYS
def test_the_identity_changes_nothing(apply: Apply) -> None:
    same = apply(NOISE, affine([1, 0, 0], [0, 1, 0]))
    assert torch.allclose(same, NOISE, atol=1e-2)  # a coordinate's rounding, times 255


@BOTH_WAYS
@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, 2), (-4, 5), (0, -1), (28, 0)])
def test_a_shift_moves_pixels(right: int, down: int, apply: Apply) -> None:
    """The map goes from output to input: the pixel at x comes from x + the shift."""
    expected = torch.zeros_like(NOISE)
    for y in range(28):
        for x in range(28):
            if 0 <= y + down < 28 and 0 <= x + right < 28:
                expected[:, 0, y, x] = NOISE[:, 0, y + down, x + right]
    moved = apply(NOISE, affine([1, 0, right * 2 / 28], [0, 1, down * 2 / 28]))
    assert torch.allclose(moved, expected, atol=1e-2)


@BOTH_WAYS
def test_half_a_pixel_is_the_mean_of_two(apply: Apply) -> None:
    moved = apply(NOISE, affine([1, 0, 1 / 28], [0, 1, 0]))
    assert torch.allclose(moved[..., :27], (NOISE[..., :27] + NOISE[..., 1:]) / 2, atol=1e-2)


@BOTH_WAYS
def test_a_quarter_turn_turns(apply: Apply) -> None:
    turned = apply(NOISE, affine([0, -1, 0], [1, 0, 0]))
    assert torch.allclose(turned, torch.rot90(NOISE, k=1, dims=(2, 3)), atol=1e-2)


def test_a_pure_shift_is_drawn_within_its_bounds_in_pixels() -> None:
    transforms = drawn(Recipe(shift=3.0))
    assert np.array_equal(transforms[:, :, :2], np.broadcast_to(np.eye(2, dtype=np.float32), (5000, 2, 2)))
    pixels = transforms[:, :, 2] * 28 / 2
    assert np.abs(pixels).max() <= 3 + 1e-6
    assert (pixels.max(axis=0) > 2.9).all()
    assert (pixels.min(axis=0) < -2.9).all()
    assert abs(np.corrcoef(pixels.T)[0, 1]) < 0.06  # four deviations of 1/sqrt(5000)


def test_a_pure_rotation_is_drawn_within_its_bounds_in_degrees() -> None:
    transforms = drawn(Recipe(rotate=15.0))
    assert not transforms[:, :, 2].any()
    matrices = transforms[:, :, :2].astype(np.float64)
    products = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), (5000, 2, 2)), atol=1e-6)
    degrees = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -15.001 < degrees.min() < -14.8
    assert 14.8 < degrees.max() < 15.001


def test_a_pure_zoom_is_drawn_within_its_bounds() -> None:
    transforms = drawn(Recipe(scale=0.2))
    assert not transforms[:, :, 2].any()
    assert not transforms[:, 0, 1].any()
    assert not transforms[:, 1, 0].any()
    assert np.array_equal(transforms[:, 0, 0], transforms[:, 1, 1])
    zoom = 1 / transforms[:, 0, 0]
    assert 0.8 - 1e-6 < zoom.min() < 0.81
    assert 1.19 < zoom.max() < 1.2 + 1e-6


def test_the_kinds_combine() -> None:
    """The area is the square of the zoom at any angle, and shifts are the same as without the others."""
    recipe = Recipe(shift=2.0, rotate=10.0, scale=0.1)
    transforms = drawn(recipe)
    alone = drawn(Recipe(scale=0.1))
    np.testing.assert_allclose(np.linalg.det(transforms[:, :, :2]), alone[:, 0, 0] ** 2, rtol=1e-5)
    assert np.array_equal(transforms[:, :, 2], drawn(Recipe(shift=2.0))[:, :, 2])
    angles = np.arctan2(transforms[:, 1, 0], transforms[:, 0, 0])
    assert np.abs(angles).max() <= math.radians(10) + 1e-6


def test_keyed_by_seed_and_step() -> None:
    recipe = Recipe(shift=2.0, rotate=10.0, scale=0.1)
    first = drawn(recipe, step=7, count=20)
    assert np.array_equal(drawn(recipe, step=7, count=20), first)
    assert np.array_equal(drawn(recipe.replace(lr=0.5, shards=3), step=7, count=20), first)
    assert not np.array_equal(drawn(recipe, step=8, count=20), first)
    assert not np.array_equal(drawn(recipe.replace(seed=1), step=7, count=20), first)
    assert np.array_equal(drawn(recipe, step=7, count=9), first[:9])  # an image's own, whatever follows
    assert len(np.unique(first[:, :, 2])) == 40


def test_pixels_move_alike_in_images_of_any_shape() -> None:
    recipe = Recipe(shift=3.0, rotate=20.0, scale=0.2)
    tall, square = drawn(recipe, count=50, shape=(3, 64, 48)), drawn(recipe, count=50)
    per_pixel = np.array([2 / 48, 2 / 64])  # a pixel's width and height in coordinates from -1 to 1
    in_pixels = tall[:, :, :2] * per_pixel / per_pixel[:, None]
    np.testing.assert_allclose(in_pixels, square[:, :, :2], atol=1e-6)
    np.testing.assert_allclose(tall[:, :, 2] / per_pixel, square[:, :, 2] * 14, atol=1e-5)


@BOTH_WAYS
def test_colours_move_together(apply: Apply) -> None:
    colours = NOISE[:, :, :20].expand(3, 3, 20, 28) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    moved = apply(colours, affine([0.9, 0.1, 0.2], [-0.1, 0.9, -0.1]))
    assert torch.allclose(moved[:, 1], moved[:, 0] / 2)
    assert torch.allclose(moved[:, 2], moved[:, 0] / 4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 40)])
def test_the_exact_way_is_the_other_up_to_rounding(shape: ImageShape) -> None:
    """Also for images moved out of sight, for empty batches, and with bits that do not depend on others."""
    noise = (
        torch.from_numpy(uniform(random_bits(40 * math.prod(shape), "noise"))).view(40, *shape).float()
        * 255
    )
    transforms = torch.from_numpy(drawn(Recipe(shift=20, rotate=90, scale=0.5), count=40, shape=shape))
    whole = resample(noise, transforms)
    assert torch.allclose(whole, apply_transforms(noise, transforms), atol=3e-2)
    assert torch.equal(resample(noise[7:9], transforms[7:9]), whole[7:9])
    lying = noise.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(resample(lying, transforms), whole)
    assert resample(noise[:0], transforms[:0]).shape == (0, *shape)
    far = affine([1, 0, 99], [0, 1, -99]).expand(3, 2, 3)
    assert not resample(NOISE, far).any()


def test_the_exact_recipe_draws_and_resamples_with_the_same_bits_everywhere() -> None:
    """The digest was computed once; a machine with another one breaks the promise."""
    recipe = Recipe(shift=3, rotate=20, scale=0.2, batch_size=16, precision="exact")
    transforms = drawn(recipe, count=1000)
    others = drawn(recipe.replace(precision="fp32"), count=1000)
    np.testing.assert_allclose(transforms, others, atol=1e-7)
    pixels = torch.from_numpy((random_bits(16 * 28 * 28, "pixels") % np.uint64(256)).astype(np.uint8))
    split = Split(pixels.view(16, 28, 28), torch.zeros(16, dtype=torch.uint8))
    exact, other = (
        Batches(split, made, mean=0.25, std=0.5).take(0, range(16 if made is recipe else 8)).images
        for made in (recipe, recipe.replace(precision="fp32"))
    )
    assert torch.allclose(exact, other, atol=1e-3)
    assert not torch.equal(exact, other)
    assert digest([transforms, exact])[:16] == "e66b96d059aaaa09"
