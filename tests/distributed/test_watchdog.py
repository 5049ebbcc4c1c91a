"""The watchdog's threads, with a coordinator in memory and without ending the process."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import watchdog
from distributed_mnist.distributed.heartbeat import Heartbeat, RankStatus
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.distributed.watchdog import Watchdog

LIMIT = 1.0
PATIENCE = 30.0
PEERS = [Peer(rank, "somewhere", 100 + rank) for rank in range(3)]


class Coordinator:
    """A coordinator in this process, which can break or stop to answer."""

    def __init__(self) -> None:
        self.heartbeats: dict[int, Heartbeat] = {}
        self.broken = False
        self.answers = threading.Event()
        self.answers.set()

    def exchange(self, rank: int, heartbeat: Heartbeat) -> dict[int, Heartbeat]:
        self.answers.wait(PATIENCE)
        if self.broken:
            raise BrokenPipeError("Broken pipe")
        self.heartbeats[rank] = heartbeat
        return self.heartbeats.copy()


class Group:
    """A rank with a watchdog, and its view of the others. `code` would be its process's exit code."""

    def __init__(self, rank: int) -> None:
        self.coordinator = Coordinator()
        self.status = RankStatus(LIMIT)
        self.code: int | None = None
        self.over = threading.Event()
        self._number = 0
        self._watchdog = Watchdog(
            Placement(rank=rank, size=3),
            PEERS,
            self.status,
            partial(self.coordinator.exchange, rank),
            limit=LIMIT,
            where="somewhere port 1",
            asynchronous=False,
        )
        self._threads = set(threading.enumerate())
        self._watchdog.start()

    def end(self, code: int) -> None:
        """Instead of `os._exit`."""
        self.code = code
        self._watchdog.stop()
        self.over.set()

    def store_heartbeat(self, rank: int, *, waiting: str | None = None, idle: float = 0.0) -> None:
        """Store a new heartbeat of another rank."""
        self._number += 1
        heartbeat = Heartbeat(self._number, "training", 3, waiting, idle, LIMIT, "", "12:00:00")
        self.coordinator.heartbeats[rank] = heartbeat

    def until(self, what: Callable[[], object], meanwhile: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline
            meanwhile()
            time.sleep(0.02)

    def stop(self) -> None:
        self._watchdog.stop()
        self.coordinator.answers.set()
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """The group as rank 0 sees it, unless the test asks for another rank."""
    group = Group(getattr(request, "param", 0))
    monkeypatch.setattr(watchdog.os, "_exit", group.end)
    yield group
    group.stop()


def test_it_sends_this_ranks_heartbeat(group: Group) -> None:
    group.status.begin_step(7)
    group.until(lambda: 0 in group.coordinator.heartbeats and group.coordinator.heartbeats[0].step == 7)


def test_no_rank_is_named_while_all_make_progress(group: Group) -> None:
    def live() -> None:
        group.store_heartbeat(1)
        group.store_heartbeat(2, waiting="an all-reduce")
        group.status.set_waiting("an all-reduce")

    began = time.monotonic()
    group.until(lambda: group.over.is_set() or time.monotonic() > began + 2 * LIMIT, live)
    assert group.code is None


def test_a_rank_falls_silent(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    group.store_heartbeat(1)
    group.status.set_waiting("an all-reduce")
    group.until(group.over.is_set, lambda: group.store_heartbeat(2, waiting="an all-reduce"))
    assert group.code == 8
    line = capfd.readouterr().err
    assert line.startswith(
        "dmnist: rank 1 (pid 101 on somewhere) is stopped or cannot be reached: training, "
    )
    assert line.count("\n") == 1


def test_a_rank_without_any_heartbeat(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """It stopped between the rendezvous and its first heartbeat. The coordinator must not be blamed."""
    group.status.set_waiting("the process group setup")
    group.until(group.over.is_set, lambda: group.store_heartbeat(2, waiting="the process group setup"))
    assert group.code == 8
    line = capfd.readouterr().err
    assert line.startswith(
        "dmnist: rank 1 (pid 101 on somewhere) is stopped or cannot be reached: no heartbeat; "
    )


@pytest.mark.parametrize("how", ["broken", "stuck"])
def test_the_coordinator_is_gone(how: str, group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """Its host closed the connection, or does not answer any more."""
    group.store_heartbeat(1)
    group.store_heartbeat(2)
    group.until(lambda: 0 in group.coordinator.heartbeats)
    group.status.set_waiting("an all-gather")
    if how == "stuck":
        group.coordinator.answers.clear()
    else:
        group.coordinator.broken = True
    group.until(group.over.is_set)
    assert group.code == 8
    line = capfd.readouterr().err
    where = "rank 0 (pid 100 on somewhere) is stopped or cannot be reached (at somewhere port 1)"
    assert line.startswith(f"dmnist: {where}; rank 0 waited ")


@pytest.mark.parametrize("group", [2], indirect=True)
def test_another_rank_reports(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """And this rank ends without a message a moment later."""
    group.status.set_waiting("an all-reduce")
    group.until(group.over.is_set, lambda: group.store_heartbeat(0, waiting="an all-reduce", idle=LIMIT))
    assert group.code == 8
    assert capfd.readouterr().err == ""


def test_the_process_is_not_ended_after_stop(group: Group) -> None:
    group.status.set_waiting("an all-reduce")
    group.stop()
    assert group.code is None


def test_a_suspended_process_blames_no_rank(group: Group) -> None:
    """When it continues, all heartbeats are old. The others were suspended too, or have reported it."""
    group.store_heartbeat(1)
    group.store_heartbeat(2)
    group.until(lambda: len(group._watchdog._received) == 3)
    before = dict(group._watchdog._received)
    contact, since = group._watchdog._last_contact, group.status.last_progress
    group._watchdog._discount(100)  # more than has passed: no time may lie in the future
    assert contact <= group._watchdog._last_contact <= time.monotonic()
    assert group.status.last_progress >= since
    assert all(known.at >= before[rank].at for rank, known in group._watchdog._received.items())
