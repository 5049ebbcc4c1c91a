"""Test the cross-entropy formula, fast and exact, against autograd in float64, and row by row."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mnist.config import Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.exact import loss as exact_loss
from distributed_mnist.gradients import loss

Function = Callable[..., tuple[Tensor, Tensor]]
BOTH = [loss.cross_entropy, exact_loss.cross_entropy]
pytestmark = pytest.mark.parametrize("cross_entropy", BOTH, ids=["fast", "exact"])

CLASSES = (2, 10, 47)
SMOOTHING = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, as with `tree`."""
    torch.set_num_threads(1)


def drawn(n: int, classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(n * 100 + classes)
    logits = torch.randn(n, classes, generator=noise) * scale
    return logits, torch.randint(classes, (n,), generator=noise)


def reference(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return torch's losses and autograd's gradient of their sum, in float64."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    return losses.detach(), gradient


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("n", [1, 7, 256])
def test_value_and_gradient_are_torchs(
    cross_entropy: Function, n: int, classes: int, smoothing: float
) -> None:
    logits, labels = drawn(n, classes)
    losses, gradient = cross_entropy(logits, labels, smoothing)
    expected, slope = reference(logits, labels, smoothing)
    assert losses.shape == (n,)
    assert gradient.shape == (n, classes)
    assert losses.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=2e-7)


def test_without_smoothing_unless_asked(cross_entropy: Function) -> None:
    logits, labels = drawn(9, 10)
    plain, none = cross_entropy(logits, labels), cross_entropy(logits, labels, 0.0)
    assert all(map(torch.equal, plain, none))
    assert not torch.equal(plain[0], cross_entropy(logits, labels, 0.1)[0])


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("scale", [200.0, 1e4])
def test_extreme_logits_are_finite_and_right(
    cross_entropy: Function, scale: float, smoothing: float
) -> None:
    """Here `exp` alone would overflow, or its `log` would be minus infinity."""
    labels = torch.arange(10).repeat(3)
    logits = torch.full((30, 10), -scale)
    logits[:10].fill_diagonal_(scale)  # sure and right
    logits[10:20, 0] = scale  # sure, and wrong in nine of ten
    logits[20:] = scale * torch.randint(-1, 2, (10, 10), generator=torch.Generator().manual_seed(0))
    losses, gradient = cross_entropy(logits, labels, smoothing)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    expected, slope = reference(logits, labels, smoothing)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-6)
    if not smoothing:
        assert not losses[:10].any()
        assert not gradient[:10].any()


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("classes", CLASSES)
def test_even_odds(cross_entropy: Function, classes: int, smoothing: float) -> None:
    """These are the first logits of a last layer of zeros."""
    losses, gradient = cross_entropy(torch.zeros(3, classes), torch.tensor([0, 1, classes - 1]), smoothing)
    assert losses.tolist() == pytest.approx([math.log(classes)] * 3, rel=1e-6)
    expected = torch.full(
        (3, classes), (1 - smoothing) / classes
    )  # p less what smoothing gives every class
    expected[range(3), [0, 1, classes - 1]] -= 1 - smoothing
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_row_is_the_same_in_any_company(cross_entropy: Function, classes: int, smoothing: float) -> None:
    """To the bit: a shard in a larger batch must have the gradient that it has alone."""
    # The exact function has no kernels that differ by the number of rows.
    logits, labels = drawn(1_000 if cross_entropy is loss.cross_entropy else 70, classes)
    losses, gradient = cross_entropy(logits, labels, smoothing)
    for size in (1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 250):
        parts = zip(logits.split(size), labels.split(size), strict=True)
        alone = [cross_entropy(part.clone(), its.clone(), smoothing) for part, its in parts]
        assert torch.equal(torch.cat([each for each, _ in alone]), losses), size
        assert torch.equal(torch.cat([each for _, each in alone]), gradient), size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(cross_entropy: Function, bad: float) -> None:
    logits, labels = drawn(20, 10)
    losses, gradient = cross_entropy(logits, labels, 0.1)
    spoilt = logits.clone()
    spoilt[7, 3] = bad
    with_it = cross_entropy(spoilt, labels, 0.1)
    assert not with_it[0][7].isfinite()
    others = torch.arange(20) != 7
    assert torch.equal(with_it[0][others], losses[others])
    assert torch.equal(with_it[1][others], gradient[others])


def test_logits_are_left_alone_and_there_is_no_graph(cross_entropy: Function) -> None:
    logits, labels = drawn(6, 10)
    before = logits.clone()
    losses, gradient = cross_entropy(logits.requires_grad_(), labels, 0.1)
    assert torch.equal(logits.detach(), before)
    assert not losses.requires_grad
    assert not gradient.requires_grad
    assert gradient.is_contiguous()


def test_logits_may_lie_in_memory_as_they_like(cross_entropy: Function) -> None:
    logits, labels = drawn(12, 10)
    lying = logits.t().contiguous().t()
    assert lying.stride() != logits.stride()
    assert all(map(torch.equal, cross_entropy(lying, labels, 0.1), cross_entropy(logits, labels, 0.1)))


def recipe_for(cross_entropy: Function, **fields: Any) -> Recipe:
    exact = cross_entropy is exact_loss.cross_entropy
    return Recipe(**fields, precision="exact" if exact else "fp32")


def test_the_recipe_chooses_the_function(cross_entropy: Function) -> None:
    made = loss.make_loss(recipe_for(cross_entropy, label_smoothing=0.1), 10, torch.device("cpu"))
    logits, labels = drawn(64, 10)
    assert all(map(torch.equal, made(logits, labels, [64]), cross_entropy(logits, labels, 0.1)))


def test_a_loss_of_ones_own_is_not_exact(cross_entropy: Function) -> None:
    recipe = recipe_for(cross_entropy, loss="user_functions:no_such_loss")
    expected = "--precision exact" if recipe.precision == "exact" else "no_such_loss"  # it looks for it
    with pytest.raises(UsageError, match=expected):
        loss.make_loss(recipe, 10, torch.device("cpu"))
