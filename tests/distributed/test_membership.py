"""Who is there, at a store in which dead processes have written: by hand, and in any order of events."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mnist.distributed.membership import Membership, Peer, meet
from distributed_mnist.errors import LaunchError


class Store:
    """torch's store as far as it is used, in memory; a value that is not there must not be asked for."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)


def process(rank: int, pid: int) -> Peer:
    return Peer(rank, "somewhere", pid)


def group(store: Store, size: int, first_pid: int = 100) -> list[Membership]:
    return [Membership(store, process(rank, first_pid + rank), size) for rank in range(size)]


def finish_all(calls: list[Membership]) -> None:
    """Let all have their turns until they are done; five rounds are enough for one that is not stuck."""
    for _ in range(5):
        if sum(call.finish() for call in calls) == len(calls):  # each has its turn
            break
    else:
        pytest.fail("the roll call is not over")
    assert len({call.attempt for call in calls}) == 1
    assert all(call.peers == calls[0].peers for call in calls)


def pids(call: Membership) -> list[int]:
    return [peer.pid for peer in call.peers]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_meet(size: int) -> None:
    calls = group(Store(), size)
    finish_all(calls)
    assert pids(calls[0]) == [100 + rank for rank in range(size)]
    assert [peer.rank for peer in calls[0].peers] == list(range(size))
    assert calls[0].attempt


def test_nobody_is_done_before_all_are_there() -> None:
    store = Store()
    calls = [Membership(store, process(rank, rank), 3) for rank in (0, 2)]
    assert not any(call.finish() for call in 5 * calls)
    assert calls[0].missing() == [1]
    assert calls[1].missing() == [0]  # the others only know rank 0, and rank 0 has not told them more
    finish_all([*calls, Membership(store, process(1, 1), 3)])


def test_rank_zero_comes_last() -> None:
    store = Store()
    others = [Membership(store, process(rank, rank), 3) for rank in (1, 2)]
    assert not any(call.finish() for call in 5 * others)
    finish_all([*others, Membership(store, process(0, 0), 3)])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 3), (2, 4), (4, 2), (3, 1), (1, 3)])
def test_a_dead_attempts_words_are_there(before: int, after: int) -> None:
    """Also at another size."""
    store = Store()
    dead = group(store, before)
    finish_all(dead)
    calls = group(store, after, first_pid=200)
    finish_all(calls)
    assert calls[0].attempt != dead[0].attempt
    assert pids(calls[0]) == [200 + rank for rank in range(after)]


def test_dead_ones_alone_are_not_enough() -> None:
    store = Store()
    finish_all(group(store, 3))
    alone = Membership(store, process(0, 200), 3)
    assert not any(alone.finish() for _ in range(5))
    assert alone.missing() == [1, 2]
    orphan = Membership(store, process(1, 201), 3)
    assert not any(call.finish() for call in 5 * [orphan, alone])
    assert alone.missing() == [2]


def test_rank_zero_died_after_it_answered() -> None:
    store = Store()
    dead, one, two = group(store, 3)
    assert not any(call.finish() for call in (dead, one, dead, one))  # which is all that rank 1 heard
    again = Membership(store, process(0, 200), 3)
    finish_all([one, two, again])
    assert one.attempt == again.attempt != dead.attempt
    assert pids(two) == [200, 101, 102]


def test_one_died_after_it_said_hello() -> None:
    store = Store()
    zero, _, two = group(store, 3)
    assert not any(call.finish() for call in (zero, two, zero, two))
    finish_all([zero, two, Membership(store, process(1, 200), 3)])
    assert pids(zero) == [100, 200, 102]


def test_one_died_after_it_was_counted() -> None:
    """Rank 0 still waits for another, so it can be set right, and the new one need not wait for ever."""
    store = Store()
    zero, one, two = (Membership(store, process(rank, 100 + rank), 4) for rank in range(3))
    assert not any(call.finish() for call in 3 * [zero, one, two])
    assert zero.missing() == [3]
    finish_all([zero, two, Membership(store, process(1, 200), 4), Membership(store, process(3, 103), 4)])
    assert pids(zero) == [100, 200, 102, 103]


def test_meet_is_the_same_in_one_call() -> None:
    assert meet(Store(), process(0, 7), 1, where="here", seconds=0).peers == [process(0, 7)]


@pytest.mark.parametrize(
    ("rank", "size", "missing"), [(0, 2, "rank 1"), (0, 4, "rank 1, 3"), (2, 4, "rank 0")]
)
def test_meet_names_who_is_missing(rank: int, size: int, missing: str) -> None:
    store = Store()
    if rank == 0:
        store = Answering(rank=2, size=size)
    with pytest.raises(LaunchError) as caught:
        meet(store, process(rank, 7), size, where="node1 port 2", seconds=0.05)
    assert str(caught.value) == f"still missing at node1 port 2 after 0 s: {missing}"


class Answering(Store):
    """A store at which one other rank, if the group is so large, takes its turn whenever it is asked."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self._other: Membership | None = None
        if rank < size:
            self._other = Membership(self, process(rank, 100 + rank), size)

    def check(self, keys: list[str], /) -> bool:
        other, self._other = self._other, None  # not while it is asking itself
        if other is not None:
            other.finish()
        self._other = other
        return super().check(keys)


# ---- Any order of events ---------------------------------------------------------------------------------


class Died(Exception):
    """The process in the middle of whose turn this is raised is dead."""


class Hosts(Store):
    """Processes that take turns at one store, come and die in an order that is given.

    A turn is interrupted at each of its words with the store: another process has its turn there, comes or
    dies, and so may the one whose turn it is.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.alive: dict[int, Membership] = {}
        self.named: dict[str, list[Peer]] = {}
        """What each attempt that somebody finished consists of."""
        self.acknowledged: set[tuple[str, int]] = set()
        """Attempts and the processes (by pid) that were told their names."""
        self._events: list[tuple[str, int]] = []
        self._turns: list[tuple[int, int]] = []  # whose turn it is: rank and pid, innermost last
        self._pids: dict[int, int] = {}
        self._started = 0

    def happen(self, events: list[tuple[str, int]]) -> None:
        self._events = events
        while self._events:
            self._next()

    def _next(self) -> None:
        what, number = self._events.pop(0)
        rank = number % self.size
        {"come": self.come, "die": self.die, "turn": self.turn, "round": self.round}[what](rank)

    def come(self, rank: int) -> None:
        if rank not in self._pids:
            self._started += 1
            self._pids[rank] = self._started
            self._turn(rank, lambda: self.alive.update({rank: self._say_hello(rank)}))

    def _say_hello(self, rank: int) -> Membership:
        return Membership(self, process(rank, self._pids[rank]), self.size)

    def die(self, rank: int) -> None:
        self._pids.pop(rank, None)
        self.alive.pop(rank, None)

    def turn(self, rank: int) -> None:
        if rank in self.alive and rank not in [who for who, _ in self._turns]:
            self._turn(rank, lambda: self._finish(rank))

    def round(self, first: int) -> None:
        """All have their turns."""
        for rank in range(first, first + self.size):
            self.turn(rank % self.size)

    def _turn(self, rank: int, what: Callable[[], None]) -> None:
        self._turns.append((rank, self._pids[rank]))
        try:
            what()
        except Died:
            pass
        finally:
            self._turns.pop()

    def _finish(self, rank: int) -> None:
        call = self.alive[rank]
        if not call.finish():
            return
        assert [peer.rank for peer in call.peers] == list(range(self.size))
        assert call.peers[rank].pid == self._pids[rank]
        assert self.named.setdefault(call.attempt, call.peers) == call.peers
        others = {(call.attempt, peer.pid) for peer in call.peers[1:]}
        assert others <= self.acknowledged, "somebody is counted who does not know"

    def _word(self) -> None:
        """Before each word with the store: something else happens, perhaps the end of who speaks."""
        if self._events and len(self._turns) < 4:
            self._next()
        if not self._lives(*self._turns[-1]):
            raise Died

    def pid(self, rank: int) -> int:
        return self._pids[rank]

    def _lives(self, rank: int, pid: int) -> bool:
        return self._pids.get(rank) == pid

    def set(self, key: str, value: str, /) -> None:
        self._word()
        super().set(key, value)
        attempt, _, rest = key.partition("/")
        if rest.startswith("here/"):
            self.acknowledged.add((attempt, self._turns[-1][1]))

    def get(self, key: str, /) -> bytes:
        self._word()
        return super().get(key)

    def check(self, keys: list[str], /) -> bool:
        self._word()
        return super().check(keys)

    def complete(self) -> bool:
        """Whether some rank 0 has called an attempt complete."""
        return any(key.endswith("/all") for key in self.values)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["turn", "round", "round", "come", "come", "die"]), st.integers(0, 3)),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 4), EVENTS, st.permutations(range(4)), st.integers(0, 4), st.integers(1, 4))
def test_any_order_of_deaths_and_restarts(
    size: int, events: list[tuple[str, int]], order: list[int], number_at_first: int, size_after: int
) -> None:
    """Who is done agrees with all who are done under that name; and a group of the living always meets."""
    hosts = Hosts(size)
    for rank in order[:number_at_first]:
        hosts.come(rank % size)
    hosts.happen(events)
    if hosts.complete():  # some may be gone since: their launcher starts all again, perhaps at another size
        for rank in range(size):
            hosts.die(rank)
        hosts.size = size_after
    ranks = [rank for rank in order if rank < hosts.size]
    for rank in ranks:
        hosts.come(rank)
    calls = [hosts.alive[rank] for rank in sorted(ranks)]
    for _ in range(5):
        for rank in ranks:
            hosts.turn(rank)
    assert {call.attempt for call in calls} == {calls[0].attempt}
    for call in calls:
        assert pids(call) == [hosts.pid(rank) for rank in sorted(ranks)]
