"""The hint about the number of processes, the times of a step's phases, and settings that change."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_mnist.common.placement import ALONE
from distributed_mnist.common.process_state import defined_state
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import TrainingError
from distributed_mnist.training.sync_points import PhaseTimer, SyncPoints, suggest_fewer_processes


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
def test_suggests_fewer_processes(size: int, step: float, exchange: float, fewer: int | None) -> None:
    hint = suggest_fewer_processes(size, step, exchange)
    if fewer is None:
        assert hint is None
    else:
        processes = "1 process would" if fewer == 1 else f"{fewer} processes would"
        assert hint is not None
        assert processes in hint
        assert hint.startswith(f"{exchange:.0%} of a step")


@given(st.integers(2, 64), st.floats(0, 1))
def test_never_suggests_a_slower_size(size: int, share: float) -> None:
    """If the computation is shared evenly, the suggested number of processes takes no longer."""
    hint = suggest_fewer_processes(size, 1.0, share)
    if hint is not None:
        fewer = int(hint.split(": ")[1].split()[0])
        assert 1 <= fewer < size
        assert (1 - share) * size / fewer <= 1.0 + 1e-9


def test_phases_leave_out_communication_and_inner_phases() -> None:
    world: Any = SimpleNamespace(communication_seconds=0.0)
    timer = PhaseTimer(world)
    began = time.perf_counter()
    with timer.phase("outer"):
        with timer.phase("inner"):
            time.sleep(0.02)
        time.sleep(0.01)
        world.communication_seconds += 0.005  # as if half of that had been spent in a collective
    took = time.perf_counter() - began
    found = timer.reset(2)
    assert found["inner"] >= 0.01
    assert 2 * sum(found.values()) <= took - 0.005
    assert 0.0025 <= found["outer"] <= (took - 0.02 - 0.005) / 2


def test_phases_start_again_from_zero() -> None:
    world: Any = SimpleNamespace(communication_seconds=0.0)
    timer = PhaseTimer(world)
    with timer.phase("a"):
        pass
    assert timer.reset(1).keys() == {"a"}
    assert timer.reset(1) == {}
    with timer.phase("a"):
        time.sleep(0.01)
    with timer.phase("a"):
        time.sleep(0.01)
    assert timer.reset(2)["a"] >= 0.01
    assert timer.reset(0) == {}


def test_a_setting_that_changes_during_training_ends_it() -> None:
    with defined_state():
        torch.set_num_threads(1)
        points = SyncPoints(World(ALONE, torch.device("cpu"), "none"), 0, 10)
        points.start()
        assert points.sync(1, stop=False, save=True) == (False, True)
        torch.set_num_threads(2)
        with pytest.raises(
            TrainingError, match="torch's number of threads from 1 to 2: the model or another"
        ):
            points.sync(2, stop=False, save=False)
