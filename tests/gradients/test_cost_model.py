"""The model of an exchange: its formulas, what they say at the edges, and that they can be fitted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_mnist.gradients.cost_model import (
    LOOPBACK,
    How,
    Link,
    exchange_bytes,
    exchange_seconds,
    fitted,
    table_of,
)

WAYS: tuple[How, ...] = ("doubling", "halving", "slices", "ring")
LINK = Link(latency=10e-6, overhead=1e-6, bandwidth=1e9)


@pytest.mark.parametrize("how", WAYS)
def test_alone_costs_nothing(how: How) -> None:
    assert exchange_seconds(how, 1, 1_000_000, LINK) == 0
    assert exchange_bytes(how, 1, 1_000_000) == 0


def test_two_by_hand() -> None:
    """A megabyte at a gigabyte a second is a millisecond."""
    assert exchange_seconds("doubling", 2, 1_000_000, LINK) == pytest.approx(1.01e-3)
    assert exchange_seconds("halving", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)
    assert exchange_seconds("ring", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)
    assert exchange_seconds("slices", 2, 1_000_000, LINK) == pytest.approx(1.02e-3)
    assert {how: exchange_bytes(how, 2, 1_000_000) for how in WAYS} == dict.fromkeys(WAYS, 1_000_000)


def test_eight_by_hand() -> None:
    assert exchange_seconds("doubling", 8, 8_000, LINK) == pytest.approx(3 * (10e-6 + 8e-6))
    assert exchange_seconds("halving", 8, 8_000, LINK) == pytest.approx(2 * (3 * 10e-6 + 7e-6))
    assert exchange_seconds("ring", 8, 8_000, LINK) == pytest.approx(14 * (10e-6 + 1e-6))
    assert exchange_bytes("doubling", 8, 8_000) == 24_000
    assert exchange_bytes("halving", 8, 8_000) == exchange_bytes("ring", 8, 8_000) == 14_000
    assert exchange_bytes("slices", 8, 8_000, roots=2) == 21_000


@given(st.sampled_from(WAYS), st.integers(1, 10), st.integers(1, 10**9))
def test_more_ranks_or_bytes_never_cost_less(how: How, level: int, nbytes: int) -> None:
    cost = exchange_seconds(how, 2**level, nbytes, LINK)
    assert 0 < cost <= exchange_seconds(how, 2 ** (level + 1), nbytes, LINK)
    assert cost <= exchange_seconds(how, 2**level, 2 * nbytes, LINK)


@pytest.mark.parametrize(("nbytes", "quickest"), [(1_000, "doubling"), (100_000_000, "halving")])
def test_few_bytes_are_doubled_and_many_halved(nbytes: int, quickest: How) -> None:
    ways: tuple[How, ...] = ("doubling", "halving")
    assert min(ways, key=lambda how: exchange_seconds(how, 64, nbytes, LOOPBACK)) == quickest


def test_a_link_is_found_from_its_messages() -> None:
    messages = [(0, 50e-6), (1_000_000, 50e-6 + 1e-3), (4_000_000, 50e-6 + 4e-3)]
    link = fitted(messages)
    assert link.latency == 50e-6
    assert link.bandwidth == pytest.approx(1e9)


def test_messages_that_seem_to_take_no_time() -> None:
    """A clock's accident must not divide by zero."""
    link = fitted([(0, 2e-6), (1_000, 1e-6)])
    assert math.isfinite(link.bandwidth)
    assert link.bandwidth > 0


def test_the_table_reaches_a_thousand_ranks() -> None:
    rows = table_of(LINK)
    assert {row["size"] for row in rows} == {2**k for k in range(1, 11)}
    row = next(row for row in rows if row["size"] == 1024 and row["bytes"] == 860_776)
    assert row["halving"] == exchange_seconds("halving", 1024, 860_776, LINK)
