"""Test sums of a fixed order, and softmax."""

import math

import numpy as np
import pytest
import torch

from distributed_mnist.exact.ordered_sums import first_largest, log_softmax, softmax, sum_over

NOISE = torch.randn(7, 13, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_halves(terms: list[float]) -> float:
    """Add the second half to the first, as the module says."""
    while len(terms) > 1:
        half = len(terms) // 2
        added = [a + b for a, b in zip(terms, terms[len(terms) - half :], strict=False)]
        terms = added + terms[half : len(terms) - half]
    return terms[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100, 577])
def test_the_order_is_by_halves(count: int) -> None:
    terms = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    before = terms.clone()
    assert sum_over(terms, 0).item() == by_halves(terms.tolist())
    assert torch.equal(terms, before)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_each_sum_is_the_same_in_any_company_and_layout(dim: int) -> None:
    whole = sum_over(NOISE, dim)
    torch.testing.assert_close(whole, NOISE.sum(dim))
    lying = NOISE.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert lying.stride() != NOISE.stride()
    assert torch.equal(sum_over(lying, dim), whole)
    rows = NOISE.movedim(dim, -1).reshape(-1, NOISE.shape[dim])
    alone = torch.stack([sum_over(row, 0) for row in rows])
    assert torch.equal(alone, whole.flatten())


def test_a_sum_is_not_a_view() -> None:
    one = torch.ones(3, 1, dtype=torch.float64)
    sum_over(one, 1).zero_()
    assert one.all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_softmax(dim: int, scale: float) -> None:
    logits = NOISE * scale
    torch.testing.assert_close(softmax(logits, dim), logits.softmax(dim), rtol=1e-14, atol=1e-300)
    torch.testing.assert_close(log_softmax(logits, dim), logits.log_softmax(dim), rtol=1e-14, atol=1e-14)


def test_softmax_of_masked_positions() -> None:
    """Attention masks with minus infinity."""
    p = softmax(torch.tensor([1.0, -math.inf, 1.0, -math.inf], dtype=torch.float64), 0)
    assert p.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_first_of_equal_maxima(dim: int) -> None:
    values = torch.randint(3, (4, 5, 6), generator=torch.Generator().manual_seed(0)).float()
    expected = np.argmax(values.numpy(), axis=dim)  # of equal values the first, by NumPy's documentation
    assert first_largest(values, dim).tolist() == expected.tolist()
    values.select(dim, 1)[0, 0] = math.nan
    assert first_largest(values, dim)[0, 0] == values.shape[dim] - 1
