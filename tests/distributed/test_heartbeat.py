"""Heartbeats, and the exact sentences of the diagnosis when a group makes no progress."""

import re
import runpy
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_mnist.distributed import heartbeat
from distributed_mnist.distributed.heartbeat import Heartbeat, RankStatus, ReceivedHeartbeat, diagnose
from distributed_mnist.distributed.peer import Peer

NOW, LIMIT = 1000.0, 60.0
PEERS = [Peer(rank, f"node{rank // 2}", 100 + rank) for rank in range(4)]
BUSY = Heartbeat(9, "training", 41, None, 0.2, LIMIT, "", "12:00:00")
WAITS = replace(BUSY, waiting="an all-reduce", idle=60.0)
"""Waiting for as long as is allowed."""
WAITED = "; rank 2 waited 60 s for it in an all-reduce, at step 41 (--hang-after 60)"


def diagnosis(
    heartbeats: Mapping[int, Heartbeat | None],
    *,
    me: int = 2,
    ages: Mapping[int, float] | None = None,
    contact: float = 0.5,
    asynchronous: bool = False,
) -> tuple[str, int] | None:
    """The diagnosis if all ranks wait except those in `heartbeats`; `ages` are seconds since they came."""
    all_heartbeats = {**dict.fromkeys(range(4), WAITS), **heartbeats}
    received = {
        rank: ReceivedHeartbeat(heartbeat, NOW - (ages or {}).get(rank, 0.0))
        for rank, heartbeat in all_heartbeats.items()
        if heartbeat is not None
    }
    return diagnose(
        me,
        PEERS,
        received,
        last_contact=NOW - contact,
        now=NOW,
        limit=LIMIT,
        silence=LIMIT / 2,
        where="node0 port 7",
        asynchronous=asynchronous,
    )


# ---- Too early, or not at all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mine",
    [
        replace(WAITS, idle=59.9),
        replace(BUSY, idle=3600.0),  # a rank that does not wait makes no diagnosis: the others do
        replace(BUSY, idle=3600.0, phase="saving a checkpoint", patience=300.0),
    ],
)
def test_too_early(mine: Heartbeat) -> None:
    assert diagnosis({1: None, 2: mine}) is None
    assert diagnosis({2: mine}, contact=100.0) is None


def test_the_age_of_a_heartbeat_counts() -> None:
    mine = replace(WAITS, idle=50.0)
    assert diagnosis({1: None, 2: mine}, ages={2: 9.0}) is None
    assert diagnosis({1: None, 2: mine}, ages={2: 10.0}) is not None


def test_a_busy_rank_may_be_busy() -> None:
    assert diagnosis({1: BUSY}) is None
    assert diagnosis({1: replace(BUSY, idle=53.9)}) is None


@pytest.mark.parametrize("phase", ["loading data", "saving a checkpoint"])
def test_some_phases_may_be_long(phase: str) -> None:
    assert diagnosis({0: replace(BUSY, phase=phase, idle=260.0, patience=300.0)}) is None
    found = diagnosis({0: replace(BUSY, phase=phase, idle=280.0, patience=300.0)})
    assert found == (
        f"rank 0 (pid 100 on node0) has made no progress for 280 s: {phase}, step 41{WAITED}",
        1,
    )


def test_the_awaited_rank_has_just_arrived() -> None:
    """All wait in the same collective, which is under way: nothing is wrong."""
    assert diagnosis({0: replace(WAITS, waiting="broadcast", idle=0.4)}) is None
    assert diagnosis({0: replace(WAITS, idle=53.0)}) is None


# ---- Some rank is at fault -------------------------------------------------------------------------------


def test_a_silent_rank() -> None:
    found = diagnosis({1: replace(BUSY, clock="11:59:29")}, ages={1: 30.1})
    assert found == (
        "rank 1 (pid 101 on node0) is stopped or cannot be reached: training, step 41, "
        f"last heartbeat at 11:59:29{WAITED}",
        0,
    )
    assert diagnosis({1: BUSY}, ages={1: 29.9}) is None


def test_a_silent_rank_whose_last_heartbeat_said_it_waits() -> None:
    found = diagnosis({3: replace(WAITS, clock="11:58:00")}, ages={3: 120.0})
    assert found is not None
    assert found[0].startswith(
        "rank 3 (pid 103 on node1) is stopped or cannot be reached: training, step 41"
    )


def test_a_rank_without_any_heartbeat() -> None:
    assert diagnosis({3: None}) == (
        f"rank 3 (pid 103 on node1) is stopped or cannot be reached: no heartbeat{WAITED}",
        0,
    )


def test_a_rank_without_progress() -> None:
    stuck = replace(BUSY, step=42, idle=58.0, where="mine.py:17 forward")
    assert diagnosis({1: stuck}) == (
        "rank 1 (pid 101 on node0) has made no progress for 58 s: training, step 42, "
        f"in mine.py:17 forward{WAITED}",
        0,
    )
    assert diagnosis({1: replace(stuck, where="")}) == (
        f"rank 1 (pid 101 on node0) has made no progress for 58 s: training, step 42{WAITED}",
        0,
    )


def test_several_are_named_and_the_first_waiting_rank_reports() -> None:
    stuck = replace(BUSY, idle=61.0)
    found = diagnosis({0: stuck, 1: None})
    assert found == (
        "rank 0 (pid 100 on node0) has made no progress for 61 s: training, step 41; "
        f"rank 1 (pid 101 on node0) is stopped or cannot be reached: no heartbeat{WAITED}",
        2,
    )


def test_a_rank_that_began_to_wait_later_does_not_report() -> None:
    """It has no diagnosis yet, and would be ended, or see a lost peer, before it has one."""
    late = replace(WAITS, idle=55.0)
    found = diagnosis({0: late, 1: late, 3: None})
    assert found is not None
    assert found[1] == 2
    found = diagnosis({0: late, 1: replace(WAITS, idle=59.7), 3: None})
    assert found is not None
    assert found[1] == 1


def test_nobody_waits_long_enough_but_me() -> None:
    found = diagnosis({0: None, 1: None, 3: None})
    assert found is not None
    assert found[1] == 2


# ---- The store is out of reach ---------------------------------------------------------------------------


def test_the_store_is_out_of_reach() -> None:
    """Then the other ranks' heartbeats are unknown too, so every rank reports."""
    found = diagnosis({0: replace(BUSY, step=40)}, ages={0: 30.1, 1: 30.1, 3: 30.1}, contact=30.1)
    assert found == (
        "rank 0 (pid 100 on node0) is stopped or cannot be reached (at node0 port 7): "
        f"last heartbeat: training, step 40{WAITED}",
        2,
    )


def test_rank_zero_is_out_of_reach_and_zero_sent_no_heartbeat() -> None:
    assert diagnosis({0: None, 1: None, 3: None}, contact=61.0) == (
        f"rank 0 (pid 100 on node0) is stopped or cannot be reached (at node0 port 7){WAITED}",
        2,
    )


def test_rank_zero_does_not_answer_itself() -> None:
    assert diagnosis({}, me=0, contact=61.0) == (
        "rank 0 (pid 100 on node0) is stopped or cannot be reached (at node0 port 7); "
        "rank 0 waited 60 s for it in an all-reduce, at step 41 (--hang-after 60)",
        0,
    )


def test_a_coordinator_that_was_slow_once() -> None:
    assert diagnosis({1: BUSY}, contact=29.9) is None


# ---- No rank is at fault ---------------------------------------------------------------------------------


def test_all_wait() -> None:
    found = diagnosis({1: replace(WAITS, waiting="an all-gather"), 3: replace(WAITS, step=42)})
    assert found == (
        "no rank makes progress, though all are alive (rank 0 (pid 100 on node0) in an all-reduce at step "
        "41, rank 1 (pid 101 on node0) in an all-gather at step 41, "
        "rank 2 (pid 102 on node1) in an all-reduce at step 41, "
        "rank 3 (pid 103 on node1) in an all-reduce at step 42): a connection between them is cut, "
        "or they call different collectives",
        0,
    )


def test_all_wait_and_one_does_so_in_its_long_phase() -> None:
    """The phase may take long, but not the wait for other ranks."""
    waits = replace(WAITS, phase="saving a checkpoint", patience=300.0)
    found = diagnosis({0: waits})
    assert found is not None
    assert found[0].startswith("no rank makes progress")


# ---- Asynchronous devices --------------------------------------------------------------------------------


def test_asynchronous_devices() -> None:
    """The main thread runs ahead of its device: a rank stuck in a step may wait for another rank."""
    stands = replace(BUSY, idle=61.0, where="train.py:150 train_step")
    in_a_step = "training (train.py:150 train_step) at step 41"
    assert diagnosis({0: stands, 1: stands, 3: stands}, asynchronous=True) == (
        f"no rank makes progress, though all are alive (rank 0 (pid 100 on node0) {in_a_step}, "
        f"rank 1 (pid 101 on node0) {in_a_step}, rank 2 (pid 102 on node1) in an all-reduce at step 41, "
        f"rank 3 (pid 103 on node1) {in_a_step}): a connection between them is cut, "
        "or they call different collectives",
        0,
    )
    assert diagnosis({2: stands, 1: None}, asynchronous=True) == (
        "rank 1 (pid 101 on node0) is stopped or cannot be reached: no heartbeat; "
        "rank 2 waited 61 s for it in a step, at step 41 (--hang-after 60)",
        0,
    )


@pytest.mark.parametrize("me", range(4))
def test_asynchronous_devices_and_a_long_phase(me: int) -> None:
    """Rank 0 downloads the data, which may take long on a GPU just as on a CPU."""
    loads = replace(BUSY, phase="loading data", idle=100.0, patience=3600.0)
    assert diagnosis({0: loads}, me=me, asynchronous=True) is None
    assert diagnosis({0: BUSY}, me=me, asynchronous=True) is None


# ---- A rank's own status ---------------------------------------------------------------------------------


def test_the_heartbeat_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    status = RankStatus(LIMIT)
    main = threading.get_ident()
    clock.now += 0.5
    sent = status.heartbeat(1, main)
    assert (sent.number, sent.phase, sent.step, sent.waiting) == (1, "starting", 0, None)
    assert (sent.idle, sent.patience, sent.where) == (0.5, LIMIT, "")
    status.enter("saving a checkpoint", patience=300.0)
    clock.now += 7
    sent = status.heartbeat(2, main)
    assert (sent.number, sent.phase, sent.idle, sent.patience) == (2, "saving a checkpoint", 7, 300.0)
    assert sent.where  # the line is included as soon as a rank is idle for a second
    status.enter("training", patience=1.0)  # never less than in an ordinary phase
    status.begin_step(12)
    status.set_waiting("an all-to-all")
    clock.now += 2
    sent = status.heartbeat(3, main)
    assert (sent.phase, sent.step, sent.waiting, sent.idle) == ("training", 12, "an all-to-all", 2)
    assert sent.patience == LIMIT
    status.set_waiting(None)
    assert status.heartbeat(4, main).waiting is None
    assert status.heartbeat(4, main).idle == 0


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    status = RankStatus(LIMIT)
    status.set_waiting("an all-reduce")
    clock.now += 103
    status.discount(100)
    assert status.heartbeat(1, threading.get_ident()).idle == 3
    status.discount(100)
    assert status.heartbeat(2, threading.get_ident()).idle == 0


@pytest.mark.parametrize("change", ["enter", "begin step", "wait", "go on"])
def test_read_at_any_moment_a_rank_is_not_idle_for_what_it_did_before(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other thread may read between two assignments."""
    clock = Clock(monkeypatch)
    seen: list[Heartbeat] = []

    class Watched(RankStatus):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if watching:
                seen.append(self.heartbeat(len(seen), 0))

    watching = False
    status = Watched(LIMIT)
    status.set_waiting("an all-reduce" if change == "go on" else None)
    status.enter("saving a checkpoint", patience=300.0)
    clock.now += 200
    watching = True
    if change == "enter":
        status.enter("training")
    elif change == "begin step":
        status.begin_step(3)
    else:
        status.set_waiting(None if change == "go on" else "an all-gather")
    assert seen
    assert [sent.idle for sent in seen] == [0] * len(seen)


class Clock:
    """`time` of the module under test; stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(heartbeat, "time", self)

    def monotonic(self) -> float:
        return self.now

    strftime = staticmethod(time.strftime)


# ---- The line that is executed ---------------------------------------------------------------------------

USERS = """
import sys
import torch
from torch import nn
from distributed_mnist.models.build import forward

def alone():
    return sys._getframe()

class Model(nn.Module):
    def forward(self, images):
        self.frame = sys._getframe()
        return images

def in_a_users_model():
    model = Model()
    forward(model, torch.zeros(1), "fp32")
    return model.frame

def in_torch_then():
    model = Model()
    forward(model, torch.zeros(1), "fp32")
    return model.frame.f_back

def nowhere():
    return None
"""


@pytest.mark.parametrize(
    ("function", "place"),
    [
        ("alone", "mine.py:7 alone"),
        ("in_a_users_model", "mine.py:12 forward"),
        ("in_torch_then", r"build.py:\d+ forward"),
        ("nowhere", ""),
    ],
)
def test_the_line_that_is_named(function: str, place: str, tmp_path: Path) -> None:
    """A line of the user's model if that is being executed; else the program's, not its caller's."""
    path = tmp_path / "mine.py"
    path.write_text(USERS.lstrip())
    frame = runpy.run_path(str(path))[function]()
    assert re.fullmatch(place, heartbeat._user_line(frame))
