"""The two threads that find a rank that stopped: at a store in memory, with what they would end caught."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import watchdog
from distributed_mnist.distributed.heartbeat import Heartbeat, RankStatus
from distributed_mnist.distributed.membership import Peer
from distributed_mnist.distributed.watchdog import Watchdog

LIMIT = 1.0
PATIENCE = 30.0
PEERS = [Peer(rank, "somewhere", 100 + rank) for rank in range(3)]


class Store:
    """torch's store as far as it is used; like it, waits for values that are not there."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.broken = False
        self.answers = threading.Event()
        self.answers.set()

    def _answer(self) -> None:
        self.answers.wait(PATIENCE)
        if self.broken:
            raise RuntimeError("Broken pipe")

    def set(self, key: str, value: str, /) -> None:
        self._answer()
        self.values[key] = value

    def check(self, keys: list[str], /) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self._answer()
        deadline = time.monotonic() + PATIENCE
        while not self.check(keys) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self.values[key].encode() for key in keys]


class Group:
    """A rank that watches, and the others as they seem to it; `code` is what its process would end with."""

    def __init__(self, rank: int) -> None:
        self.store = Store()
        self.mine = RankStatus(LIMIT)
        self.code: int | None = None
        self.over = threading.Event()
        self._number = 0
        self._watch = Watchdog(
            Placement(rank=rank, size=3),
            PEERS,
            self.mine,
            self.store,
            limit=LIMIT,
            where="somewhere port 1",
            asynchronous=False,
        )
        self._threads = set(threading.enumerate())
        self._watch.start()

    def end(self, code: int) -> None:
        """Instead of `os._exit`."""
        self.code = code
        self._watch.stop()
        self.over.set()

    def says(self, rank: int, *, waiting: str | None = None, idle: float = 0.0) -> None:
        """A new sign of another rank."""
        self._number += 1
        sign = Heartbeat(self._number, "training", 3, waiting, idle, LIMIT, "", "12:00:00")
        self.store.values[f"life/{rank}"] = sign.encode()

    def until(self, what: Callable[[], object], meanwhile: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline
            meanwhile()
            time.sleep(0.02)

    def stop(self) -> None:
        self._watch.stop()
        self.store.answers.set()
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """Watched by rank 0, unless the test asks for another."""
    group = Group(getattr(request, "param", 0))
    monkeypatch.setattr(watchdog.os, "_exit", group.end)
    yield group
    group.stop()


def test_it_tells_what_this_rank_does(group: Group) -> None:
    group.mine.at(7)
    group.until(lambda: '"step": 7' in group.store.values.get("life/0", ""))


def test_nobody_is_named_while_all_go_on(group: Group) -> None:
    def live() -> None:
        group.says(1)
        group.says(2, waiting="a sum")
        group.mine.wait("a sum")

    began = time.monotonic()
    group.until(lambda: group.over.is_set() or time.monotonic() > began + 2 * LIMIT, live)
    assert group.code is None


def test_a_rank_falls_silent(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    group.says(1)
    group.mine.wait("a sum")
    group.until(group.over.is_set, lambda: group.says(2, waiting="a sum"))
    assert group.code == 8
    line = capfd.readouterr().err
    assert line.startswith(
        "dmnist: rank 1 (pid 101 on somewhere) is stopped or cannot be reached: training, "
    )
    assert line.count("\n") == 1


def test_a_rank_never_gave_a_sign(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """It stopped between being met and its first sign: the store must not be waited for, or blamed."""
    group.mine.wait("a first meeting")
    group.until(group.over.is_set, lambda: group.says(2, waiting="a first meeting"))
    assert group.code == 8
    line = capfd.readouterr().err
    assert line.startswith(
        "dmnist: rank 1 (pid 101 on somewhere) is stopped or cannot be reached: no sign; "
    )


@pytest.mark.parametrize("how", ["broken", "stuck"])
def test_the_store_is_gone(how: str, group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """Its host ended the connection, or says nothing any more."""
    group.says(1)
    group.says(2)
    group.until(lambda: "life/0" in group.store.values)
    group.mine.wait("a gather")
    if how == "stuck":
        group.store.answers.clear()
    else:
        group.store.broken = True
    group.until(group.over.is_set)
    assert group.code == 8
    line = capfd.readouterr().err
    where = "rank 0 (pid 100 on somewhere) is stopped or cannot be reached (its store at somewhere port 1)"
    assert line.startswith(f"dmnist: {where}; rank 0 waited ")


@pytest.mark.parametrize("group", [2], indirect=True)
def test_another_tells(group: Group, capfd: pytest.CaptureFixture[str]) -> None:
    """And this one ends without a word, a moment later."""
    group.mine.wait("a sum")
    group.until(group.over.is_set, lambda: group.says(0, waiting="a sum", idle=LIMIT))
    assert group.code == 8
    assert capfd.readouterr().err == ""


def test_nobody_is_ended_after_the_end(group: Group) -> None:
    group.mine.wait("a sum")
    group.stop()
    assert group.code is None


def test_a_process_that_was_stopped_blames_nobody(group: Group) -> None:
    """When it wakes up everything it knows is old; the others were stopped too, or named it long since."""
    group.says(1)
    group.says(2)
    group.until(lambda: len(group._watch._heard) == 3)
    before = dict(group._watch._heard)
    contact, since = group._watch._contact, group.mine.since
    group._watch._awake(100)  # more than has passed: nothing was heard in the future
    assert contact <= group._watch._contact <= time.monotonic()
    assert group.mine.since >= since
    assert all(one.at >= before[rank].at for rank, one in group._watch._heard.items())
