"""Advice about the number of processes, and the times of the parts of a step."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_mnist.training.sync_points import PhaseTimer, advice


@pytest.mark.parametrize(
    ("size", "step", "exchange", "fewer"),
    [
        (1, 1.0, 0.0, None),
        (2, 1.0, 0.49, None),  # alone: 1.02
        (2, 1.0, 0.51, 1),
        (4, 1.0, 0.51, 2),  # two: 0.98; one: 1.96
        (4, 1.0, 0.76, 1),
        (8, 1.0, 0.80, 2),
        (3, 1.0, 0.67, 1),
        (3, 1.0, 0.60, None),
    ],
)
def test_advice(size: int, step: float, exchange: float, fewer: int | None) -> None:
    told = advice(size, step, exchange)
    if fewer is None:
        assert told is None
    else:
        processes = "1 process would" if fewer == 1 else f"{fewer} processes would"
        assert told is not None
        assert processes in told
        assert told.startswith(f"{exchange:.0%} of a step")


@given(st.integers(2, 64), st.floats(0, 1))
def test_nobody_is_advised_to_be_slower(size: int, share: float) -> None:
    """If the rest is shared out evenly, so many would take no longer."""
    told = advice(size, 1.0, share)
    if told is not None:
        fewer = int(told.split(": ")[1].split()[0])
        assert 1 <= fewer < size
        assert (1 - share) * size / fewer <= 1.0 + 1e-9


def test_laps_leave_out_exchanges_and_inner_laps() -> None:
    world: Any = SimpleNamespace(communication_seconds=0.0)
    laps = PhaseTimer(world)
    began = time.perf_counter()
    with laps.lap("outer"):
        with laps.lap("inner"):
            time.sleep(0.02)
        time.sleep(0.01)
        world.communication_seconds += 0.005  # as if half of that had been spent in a collective
    took = time.perf_counter() - began
    found = laps.close(2)
    assert found["inner"] >= 0.01
    assert 2 * sum(found.values()) <= took - 0.005
    assert 0.0025 <= found["outer"] <= (took - 0.02 - 0.005) / 2


def test_laps_begin_anew() -> None:
    world: Any = SimpleNamespace(communication_seconds=0.0)
    laps = PhaseTimer(world)
    with laps.lap("a"):
        pass
    assert laps.close(1).keys() == {"a"}
    assert laps.close(1) == {}
    with laps.lap("a"):
        time.sleep(0.01)
    with laps.lap("a"):
        time.sleep(0.01)
    assert laps.close(2)["a"] >= 0.01
    assert laps.close(0) == {}
