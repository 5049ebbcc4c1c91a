"""Test convolutions as matrix products against torch's `conv2d` in float64, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mnist.models.patch_conv import PatchConv, patches

# Channels in and out, kernel, stride, height, width.
SHAPES = [
    (1, 16, 5, 2, 23, 23),
    (16, 32, 2, 2, 10, 10),
    (32, 64, 3, 1, 5, 5),
    (1, 3, 4, 4, 8, 12),
    (3, 5, 4, 4, 8, 12),
    (1, 3, 4, 4, 11, 9),
    (3, 5, 4, 4, 11, 9),
    (3, 5, 2, 2, 9, 8),
    (1, 4, 3, 2, 8, 9),
    (4, 2, 3, 2, 8, 9),
    (2, 7, 3, 5, 14, 20),
    (1, 2, 2, 3, 9, 7),
    (5, 4, 1, 1, 4, 6),
    (5, 4, 1, 2, 4, 7),
    (1, 4, 1, 1, 3, 3),
    (6, 3, 5, 1, 5, 5),
    (6, 3, 5, 3, 7, 6),
    (2, 3, 3, 3, 3, 3),
]
"""Strides that divide the sides or not; patches that tile the image, overlap, leave gaps, or cover it."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, as with `tree`; several would compete for few cores."""
    torch.set_num_threads(1)


def layer(channels: int, out: int, kernel: int, stride: int) -> PatchConv:
    torch.manual_seed(channels * 100 + kernel)
    return PatchConv(channels, out, kernel, stride)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def reference(conv: PatchConv, x: Tensor, outer: Tensor | None = None) -> list[Tensor]:
    """Return the output of torch's convolution in float64, and the gradients of weight, bias and input."""
    kernel, wide = conv.kernel, [p.detach().double() for p in (conv.product.weight, conv.product.bias, x)]
    weight, bias, image = (each.requires_grad_() for each in wide)
    weights = weight.view(len(weight), kernel, kernel, x.shape[3]).permute(0, 3, 1, 2)
    y = F.conv2d(image.permute(0, 3, 1, 2), weights, bias, conv.stride).permute(0, 2, 3, 1)
    if outer is None:
        return [y.detach()]
    return [y.detach(), *torch.autograd.grad(y, (weight, bias, image), outer.double())]


def assert_near(got: Tensor, expected: Tensor, ratio: float) -> None:
    """Assert that they are equal up to a fraction of the largest number."""
    assert got.shape == expected.shape
    assert float((got.double() - expected).abs().max()) <= ratio * float(expected.abs().max())


@pytest.mark.parametrize(("channels", "out", "kernel", "stride", "height", "width"), SHAPES)
def test_forward_and_gradients_are_conv2ds(
    channels: int, out: int, kernel: int, stride: int, height: int, width: int
) -> None:
    conv, x = layer(channels, out, kernel, stride), drawn(3, height, width, channels)
    y = conv(x.requires_grad_())
    assert y.shape == (3, (height - kernel) // stride + 1, (width - kernel) // stride + 1, out)
    outer = drawn(*y.shape)
    expected = reference(conv, x, outer)
    got = torch.autograd.grad(y, (conv.product.weight, conv.product.bias, x), outer)
    for value, its in zip((y.detach(), *got), expected, strict=True):
        assert_near(value, its, 2e-6)


@pytest.mark.parametrize(("channels", "out", "kernel", "stride", "height", "width"), SHAPES)
def test_an_input_without_gradient_changes_no_bit(
    channels: int, out: int, kernel: int, stride: int, height: int, width: int
) -> None:
    """The first layer's input is the image, which needs no gradient and takes another path."""
    conv, x = layer(channels, out, kernel, stride), drawn(3, height, width, channels)
    y, with_gradient = conv(x), conv(x.clone().requires_grad_())
    assert torch.equal(y, with_gradient)
    with torch.no_grad():
        assert torch.equal(conv(x.clone().requires_grad_()), y)
    weights = (conv.product.weight, conv.product.bias)
    outer = drawn(*y.shape)
    ones = torch.autograd.grad(y, weights, outer)
    others = torch.autograd.grad(with_gradient, weights, outer)
    assert all(map(torch.equal, ones, others))


def cut_out(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the patches, one slice after another."""
    n, height, width, _ = x.shape
    rows, columns = range(0, height - kernel + 1, stride), range(0, width - kernel + 1, stride)
    return torch.stack(
        [x[i, r : r + kernel, c : c + kernel].flatten() for i in range(n) for r in rows for c in columns]
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("channels", "_out", "kernel", "stride", "height", "width"), SHAPES)
def test_patches_are_slices(
    channels: int, _out: int, kernel: int, stride: int, height: int, width: int, requires_grad: bool
) -> None:
    x = drawn(2, height, width, channels).requires_grad_(requires_grad)
    got = patches(x, kernel, stride)
    assert torch.equal(got, cut_out(x, kernel, stride))
    assert got.requires_grad == requires_grad


@pytest.mark.parametrize(("channels", "_out", "kernel", "stride", "height", "width"), SHAPES)
def test_a_pixels_gradient_is_the_sum_over_its_patches(
    channels: int, _out: int, kernel: int, stride: int, height: int, width: int
) -> None:
    """The numbers are integers, so that the order of additions cannot excuse a difference."""
    x = drawn(2, height, width, channels).requires_grad_()
    made = patches(x, kernel, stride)
    outer = torch.randint(-50, 51, made.shape, generator=torch.Generator().manual_seed(1)).float()
    (got,) = torch.autograd.grad(made, x, outer)
    (expected,) = torch.autograd.grad(cut_out(x, kernel, stride), x, outer)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "_out", "kernel", "stride", "height", "width"), SHAPES)
def test_a_pixel_adds_its_patches_by_its_place_in_them(
    channels: int, _out: int, kernel: int, stride: int, height: int, width: int, dtype: torch.dtype
) -> None:
    """By row, then by column. Another order has other last bits, and so other trained weights."""
    x = drawn(2, height, width, channels).to(dtype).requires_grad_()
    made = patches(x, kernel, stride)
    outer = drawn(*made.shape).pow(5).to(dtype)
    rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    parts = outer.float().view(2, rows, columns, kernel, kernel, channels)
    expected = torch.zeros(2, height, width, channels)
    for i in range(kernel):
        for j in range(kernel):
            bottom, right = i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1
            expected[:, i:bottom:stride, j:right:stride] += parts[:, :, :, i, j]
    assert torch.equal(torch.autograd.grad(made, x, outer)[0], expected.to(dtype))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gradient_may_lie_in_memory_as_it_likes(channels: int) -> None:
    x = drawn(2, 7, 6, channels).requires_grad_()
    outer = drawn(2 * 5 * 4, 9 * channels)
    expected = torch.autograd.grad(cut_out(x, 3, 1), x, outer)[0]
    lying = outer.t().contiguous().t()
    assert_near(torch.autograd.grad(patches(x, 3, 1), x, lying)[0], expected.double(), 1e-6)
    everywhere = torch.autograd.grad(patches(x, 3, 1).sum(), x)[0]
    assert torch.equal(everywhere, torch.autograd.grad(cut_out(x, 3, 1).sum(), x)[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kernel", "stride"), [(4, 4), (3, 2)])
def test_a_part_of_a_larger_image(channels: int, kernel: int, stride: int) -> None:
    """The small network uses crops without copying them."""
    conv, large = layer(channels, 4, kernel, stride), drawn(3, 20, 21, channels)
    crop = large[:, 2:14, 3:15]
    assert not crop.is_contiguous()
    assert torch.equal(conv(crop), conv(crop.contiguous()))
    assert_near(conv(crop).detach(), reference(conv, crop)[0], 2e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("channels", "out", "kernel", "stride", "height", "width"), SHAPES[:8])
def test_bfloat16_under_autocast(
    channels: int, out: int, kernel: int, stride: int, height: int, width: int, requires_grad: bool
) -> None:
    """The operands are rounded to bfloat16 and the products computed in it; the gradients are float32."""
    conv, x = layer(channels, out, kernel, stride), drawn(3, height, width, channels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x.requires_grad_(requires_grad))
    assert y.dtype == torch.bfloat16
    rounded, outer = layer(channels, out, kernel, stride), drawn(*y.shape).bfloat16()
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    expected = reference(rounded, x.detach().bfloat16(), outer)
    assert_near(y.detach(), expected[0], 2**-7)
    inputs: list[Any] = [conv.product.weight, conv.product.bias] + [x] * requires_grad
    got = torch.autograd.grad(y, inputs, outer)
    for value, its in zip(got, expected[1:], strict=requires_grad):
        assert value.dtype == torch.float32
        assert_near(value, its, 2**-7)


def test_overlapping_patches_are_not_added_up_in_bfloat16() -> None:
    """bfloat16 would stop counting at 256, but 289 patches overlap in the middle."""
    x = torch.zeros(1, 33, 33, 2, dtype=torch.bfloat16, requires_grad=True)
    (got,) = torch.autograd.grad(patches(x, 17, 1).sum(), x)
    assert got.dtype == torch.bfloat16
    assert got[0, 16, 16].tolist() == [288, 288]  # the nearest that there is


def test_the_weight_is_a_linear_layers() -> None:
    """The order is row, column, channel of the patch, because checkpoints hold the weight."""
    conv, x = layer(3, 2, 2, 1), torch.zeros(1, 2, 2, 3)
    x[0, 1, 0, 2] = 1.0
    assert [name for name, _ in conv.named_parameters()] == ["product.weight", "product.bias"]
    assert conv.product.weight.shape == (2, 12)
    expected = conv.product.weight[:, 1 * 6 + 0 * 3 + 2] + conv.product.bias
    torch.testing.assert_close(conv(x).flatten(), expected)
