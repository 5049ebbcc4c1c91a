"""Test the formulas of the cost model, including their limits, and the fit of a link."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_mnist.gradients.cost_model import (
    LOOPBACK,
    ExchangeMethod,
    Link,
    exchange_seconds,
    fit_link,
    prediction_table,
)

METHODS: tuple[ExchangeMethod, ...] = ("doubling", "halving", "slices", "ring")
LINK = Link(latency=10e-6, overhead=1e-6, bandwidth=1e9)


@pytest.mark.parametrize("method", METHODS)
def test_alone_costs_nothing(method: ExchangeMethod) -> None:
    assert exchange_seconds(method, 1, 1_000_000, LINK) == 0


def test_two_by_hand() -> None:
    """A megabyte takes a millisecond at a gigabyte per second."""
    assert exchange_seconds("doubling", 2, 1_000_000, LINK) == pytest.approx(1.01e-3)
    assert exchange_seconds("halving", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)
    assert exchange_seconds("ring", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)
    assert exchange_seconds("slices", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)


def test_eight_by_hand() -> None:
    assert exchange_seconds("doubling", 8, 8_000, LINK) == pytest.approx(3 * (10e-6 + 8e-6))
    assert exchange_seconds("halving", 8, 8_000, LINK) == pytest.approx(2 * (3 * 10e-6 + 7e-6))
    assert exchange_seconds("ring", 8, 8_000, LINK) == pytest.approx(14 * (10e-6 + 1e-6))


@given(st.sampled_from(METHODS), st.integers(1, 10), st.integers(1, 10**9))
def test_more_ranks_or_bytes_never_cost_less(method: ExchangeMethod, level: int, nbytes: int) -> None:
    cost = exchange_seconds(method, 2**level, nbytes, LINK)
    assert 0 < cost <= exchange_seconds(method, 2 ** (level + 1), nbytes, LINK)
    assert cost <= exchange_seconds(method, 2**level, 2 * nbytes, LINK)


@pytest.mark.parametrize(("nbytes", "quickest"), [(1_000, "doubling"), (100_000_000, "halving")])
def test_few_bytes_are_doubled_and_many_halved(nbytes: int, quickest: ExchangeMethod) -> None:
    methods: tuple[ExchangeMethod, ...] = ("doubling", "halving")
    assert min(methods, key=lambda method: exchange_seconds(method, 64, nbytes, LOOPBACK)) == quickest


def test_a_link_is_found_from_its_messages() -> None:
    messages = [(0, 50e-6), (1_000_000, 50e-6 + 1e-3), (4_000_000, 50e-6 + 4e-3)]
    link = fit_link(messages)
    assert link.latency == 50e-6
    assert link.bandwidth == pytest.approx(1e9)


def test_messages_that_seem_to_take_no_time() -> None:
    """Inexact clocks must not cause a division by zero."""
    link = fit_link([(0, 2e-6), (1_000, 1e-6)])
    assert math.isfinite(link.bandwidth)
    assert link.bandwidth > 0


def test_the_table_reaches_a_thousand_ranks() -> None:
    rows = prediction_table(LINK)
    assert {row["size"] for row in rows} == {2**k for k in range(1, 11)}
    row = next(row for row in rows if row["size"] == 1024 and row["bytes"] == 860_776)
    assert row["halving"] == exchange_seconds("halving", 1024, 860_776, LINK)
