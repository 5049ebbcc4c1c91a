"""What ranks tell about themselves, and what is made of it when nothing moves: sentences, exactly."""

import re
import runpy
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_mnist.distributed import heartbeat
from distributed_mnist.distributed.heartbeat import Heartbeat, RankStatus, ReceivedHeartbeat, verdict
from distributed_mnist.distributed.membership import Peer

NOW, LIMIT = 1000.0, 60.0
PEERS = [Peer(rank, f"node{rank // 2}", 100 + rank) for rank in range(4)]
BUSY = Heartbeat(9, "training", 41, None, 0.2, LIMIT, "", "12:00:00")
WAITS = replace(BUSY, waiting="a sum", idle=60.0)
"""As long as is allowed."""
TOLD = "; rank 2 waited 60 s for it in a sum, at step 41 (--hang-after 60)"


def judged(
    signs: Mapping[int, Heartbeat | None],
    *,
    me: int = 2,
    ages: Mapping[int, float] | None = None,
    contact: float = 0.5,
    asynchronous: bool = False,
) -> tuple[str, int] | None:
    """The verdict where everyone waits but those in `signs`; `ages` are seconds since a sign came."""
    told = {**dict.fromkeys(range(4), WAITS), **signs}
    heard = {
        rank: ReceivedHeartbeat(sign, NOW - (ages or {}).get(rank, 0.0))
        for rank, sign in told.items()
        if sign is not None
    }
    return verdict(
        me,
        PEERS,
        heard,
        contact=NOW - contact,
        now=NOW,
        limit=LIMIT,
        silence=LIMIT / 2,
        store="node0 port 7",
        asynchronous=asynchronous,
    )


# ---- Too early, or not at all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mine",
    [
        replace(WAITS, idle=59.9),
        replace(BUSY, idle=3600.0),  # who does not wait does not judge: the others do
        replace(BUSY, idle=3600.0, phase="saving a checkpoint", patience=300.0),
    ],
)
def test_too_early(mine: Heartbeat) -> None:
    assert judged({1: None, 2: mine}) is None
    assert judged({2: mine}, contact=100.0) is None


def test_the_age_of_a_sign_counts() -> None:
    mine = replace(WAITS, idle=50.0)
    assert judged({1: None, 2: mine}, ages={2: 9.0}) is None
    assert judged({1: None, 2: mine}, ages={2: 10.0}) is not None


def test_a_busy_rank_may_be_busy() -> None:
    assert judged({1: BUSY}) is None
    assert judged({1: replace(BUSY, idle=53.9)}) is None


@pytest.mark.parametrize("phase", ["loading data", "saving a checkpoint"])
def test_some_phases_may_be_long(phase: str) -> None:
    assert judged({0: replace(BUSY, phase=phase, idle=260.0, patience=300.0)}) is None
    found = judged({0: replace(BUSY, phase=phase, idle=280.0, patience=300.0)})
    assert found == (
        f"rank 0 (pid 100 on node0) does not go on: {phase}, step 41 for 280 s{TOLD}",
        1,
    )


def test_who_was_waited_for_has_just_come() -> None:
    """All wait in the same collective, and it is under way: nothing is wrong."""
    assert judged({0: replace(WAITS, waiting="broadcast", idle=0.4)}) is None
    assert judged({0: replace(WAITS, idle=53.0)}) is None


# ---- Somebody is to blame --------------------------------------------------------------------------------


def test_a_silent_rank() -> None:
    found = judged({1: replace(BUSY, clock="11:59:29")}, ages={1: 30.1})
    assert found == (
        "rank 1 (pid 101 on node0) is stopped or cannot be reached: training, step 41, "
        f"last sign of life at 11:59:29{TOLD}",
        0,
    )
    assert judged({1: BUSY}, ages={1: 29.9}) is None


def test_a_silent_rank_that_seemed_to_wait() -> None:
    found = judged({3: replace(WAITS, clock="11:58:00")}, ages={3: 120.0})
    assert found is not None
    assert found[0].startswith(
        "rank 3 (pid 103 on node1) is stopped or cannot be reached: training, step 41"
    )


def test_a_rank_that_never_gave_a_sign() -> None:
    assert judged({3: None}) == (
        f"rank 3 (pid 103 on node1) is stopped or cannot be reached: no sign{TOLD}",
        0,
    )


def test_a_rank_that_does_not_go_on() -> None:
    stuck = replace(BUSY, step=42, idle=58.0, where="mine.py:17 forward")
    assert judged({1: stuck}) == (
        f"rank 1 (pid 101 on node0) does not go on: training, step 42 for 58 s in mine.py:17 forward{TOLD}",
        0,
    )
    assert judged({1: replace(stuck, where="")}) == (
        f"rank 1 (pid 101 on node0) does not go on: training, step 42 for 58 s{TOLD}",
        0,
    )


def test_several_are_named_and_the_first_that_waits_tells() -> None:
    stuck = replace(BUSY, idle=61.0)
    found = judged({0: stuck, 1: None})
    assert found == (
        "rank 0 (pid 100 on node0) does not go on: training, step 41 for 61 s; "
        f"rank 1 (pid 101 on node0) is stopped or cannot be reached: no sign{TOLD}",
        2,
    )


def test_who_began_to_wait_later_does_not_tell() -> None:
    """It has not found out yet, and would be gone, or told of a lost peer, before it does."""
    late = replace(WAITS, idle=55.0)
    found = judged({0: late, 1: late, 3: None})
    assert found is not None
    assert found[1] == 2
    found = judged({0: late, 1: replace(WAITS, idle=59.7), 3: None})
    assert found is not None
    assert found[1] == 1


def test_nobody_waits_long_enough_but_me() -> None:
    found = judged({0: None, 1: None, 3: None})
    assert found is not None
    assert found[1] == 2


# ---- The store is out of reach ---------------------------------------------------------------------------


def test_the_store_is_out_of_reach() -> None:
    """Then what the others do is not known either, so every rank tells it."""
    found = judged({0: replace(BUSY, step=40)}, ages={0: 30.1, 1: 30.1, 3: 30.1}, contact=30.1)
    assert found == (
        "rank 0 (pid 100 on node0) is stopped or cannot be reached (its store at node0 port 7): "
        f"last heard of while training, step 40{TOLD}",
        2,
    )


def test_the_store_is_out_of_reach_and_rank_zero_was_never_heard_of() -> None:
    assert judged({0: None, 1: None, 3: None}, contact=61.0) == (
        f"rank 0 (pid 100 on node0) is stopped or cannot be reached (its store at node0 port 7){TOLD}",
        2,
    )


def test_rank_zero_does_not_hear_its_own_store() -> None:
    assert judged({}, me=0, contact=61.0) == (
        "rank 0 (pid 100 on node0) is stopped or cannot be reached (its store at node0 port 7); "
        "rank 0 waited 60 s for it in a sum, at step 41 (--hang-after 60)",
        0,
    )


def test_a_store_that_was_slow_once() -> None:
    assert judged({1: BUSY}, contact=29.9) is None


# ---- Nobody is to blame ----------------------------------------------------------------------------------


def test_all_wait() -> None:
    found = judged({1: replace(WAITS, waiting="a gather"), 3: replace(WAITS, step=42)})
    assert found == (
        "no rank goes on, though all are alive (rank 0 (pid 100 on node0) in a sum at step 41, "
        "rank 1 (pid 101 on node0) in a gather at step 41, rank 2 (pid 102 on node1) in a sum at step 41, "
        "rank 3 (pid 103 on node1) in a sum at step 42): a connection between them is cut, "
        "or they disagree about what comes next",
        0,
    )


def test_all_wait_and_one_does_so_in_its_long_phase() -> None:
    """In which it may be long by itself, but not wait longer than others."""
    waits = replace(WAITS, phase="saving a checkpoint", patience=300.0)
    found = judged({0: waits})
    assert found is not None
    assert found[0].startswith("no rank goes on")


# ---- Devices that work by themselves ---------------------------------------------------------------------


def test_asynchronous_devices() -> None:
    """The main thread is ahead of its device: one that stands in a step may wait for another rank."""
    stands = replace(BUSY, idle=61.0, where="train.py:150 train_step")
    in_a_step = "training (train.py:150 train_step) at step 41"
    assert judged({0: stands, 1: stands, 3: stands}, asynchronous=True) == (
        f"no rank goes on, though all are alive (rank 0 (pid 100 on node0) {in_a_step}, "
        f"rank 1 (pid 101 on node0) {in_a_step}, rank 2 (pid 102 on node1) in a sum at step 41, "
        f"rank 3 (pid 103 on node1) {in_a_step}): a connection between them is cut, "
        "or they disagree about what comes next",
        0,
    )
    assert judged({2: stands, 1: None}, asynchronous=True) == (
        "rank 1 (pid 101 on node0) is stopped or cannot be reached: no sign; "
        "rank 2 waited 61 s for it in a step, at step 41 (--hang-after 60)",
        0,
    )


@pytest.mark.parametrize("me", range(4))
def test_asynchronous_devices_and_a_long_phase(me: int) -> None:
    """Rank 0 fetches the data; on a GPU no less than on a CPU it may take its time."""
    loads = replace(BUSY, phase="loading data", idle=100.0, patience=3600.0)
    assert judged({0: loads}, me=me, asynchronous=True) is None
    assert judged({0: BUSY}, me=me, asynchronous=True) is None


# ---- A rank's own part -----------------------------------------------------------------------------------


def test_a_sign_survives_its_way() -> None:
    sign = replace(WAITS, where='a "quoted".py:1 naïve', clock="23:59:59")
    assert Heartbeat.decode(sign.encode().encode()) == sign
    assert Heartbeat.decode(BUSY.encode().encode()) == BUSY


def test_what_a_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    mine = RankStatus(LIMIT)
    main = threading.get_ident()
    clock.now += 0.5
    sign = mine.sign(1, main)
    assert (sign.number, sign.phase, sign.step, sign.waiting) == (1, "starting", 0, None)
    assert (sign.idle, sign.patience, sign.where) == (0.5, LIMIT, "")
    mine.enter("saving a checkpoint", patience=300.0)
    clock.now += 7
    sign = mine.sign(2, main)
    assert (sign.number, sign.phase, sign.idle, sign.patience) == (2, "saving a checkpoint", 7, 300.0)
    assert sign.where  # the line is looked for once it may matter
    mine.enter("training", patience=1.0)  # never less than what is always allowed
    mine.at(12)
    mine.wait("an exchange")
    clock.now += 2
    sign = mine.sign(3, main)
    assert (sign.phase, sign.step, sign.waiting, sign.idle) == ("training", 12, "an exchange", 2)
    assert sign.patience == LIMIT
    mine.wait(None)
    assert mine.sign(4, main).waiting is None
    assert mine.sign(4, main).idle == 0


def test_time_in_which_all_of_a_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    mine = RankStatus(LIMIT)
    mine.wait("a sum")
    clock.now += 103
    mine.slept(100)
    assert mine.sign(1, threading.get_ident()).idle == 3
    mine.slept(100)
    assert mine.sign(2, threading.get_ident()).idle == 0


@pytest.mark.parametrize("change", ["enter", "at", "wait", "go on"])
def test_read_at_any_moment_a_rank_is_not_idle_for_what_it_did_before(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other thread may look between two assignments."""
    clock = Clock(monkeypatch)
    seen: list[Heartbeat] = []

    class Watched(RankStatus):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if watching:
                seen.append(self.sign(len(seen), 0))

    watching = False
    mine = Watched(LIMIT)
    mine.wait("a sum" if change == "go on" else None)
    mine.enter("saving a checkpoint", patience=300.0)
    clock.now += 200
    watching = True
    if change == "enter":
        mine.enter("training")
    elif change == "at":
        mine.at(3)
    else:
        mine.wait(None if change == "go on" else "a gather")
    assert seen
    assert [sign.idle for sign in seen] == [0] * len(seen)


class Clock:
    """`time` of the module under test; stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(heartbeat, "time", self)

    def monotonic(self) -> float:
        return self.now

    strftime = staticmethod(time.strftime)


# ---- The line --------------------------------------------------------------------------------------------

USERS = """
import sys
import torch
from torch import nn
from distributed_mnist.evaluate import forward

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
        ("in_torch_then", r"evaluate.py:\d+ forward"),
        ("nowhere", ""),
    ],
)
def test_the_line_that_is_named(function: str, place: str, tmp_path: Path) -> None:
    """A user's, where it is the user's model that works; else the program's, not that of who called it."""
    path = tmp_path / "mine.py"
    path.write_text(USERS.lstrip())
    frame = runpy.run_path(str(path))[function]()
    assert re.fullmatch(place, heartbeat._place(frame))
