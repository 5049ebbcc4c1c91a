"""Membership at a store with keys of dead processes: single cases, and any order of events."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mnist.distributed.membership import Membership, Peer, join_group
from distributed_mnist.errors import LaunchError


class Store:
    """The part of torch's store that is used, in memory. No missing value may be requested."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.get(key) for key in keys]


def process(rank: int, pid: int) -> Peer:
    return Peer(rank, "somewhere", pid)


def group(store: Store, size: int, first_pid: int = 100) -> list[Membership]:
    return [Membership(store, process(rank, first_pid + rank), size) for rank in range(size)]


def complete_all(members: list[Membership]) -> None:
    """Poll all in turn until they are complete; five rounds are enough unless one is stuck."""
    for _ in range(5):
        if sum(member.poll() for member in members) == len(members):
            break
    else:
        pytest.fail("the membership is not complete")
    assert len({member.attempt for member in members}) == 1
    assert all(member.peers == members[0].peers for member in members)


def pids(member: Membership) -> list[int]:
    return [peer.pid for peer in member.peers]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_ranks_join(size: int) -> None:
    members = group(Store(), size)
    complete_all(members)
    assert pids(members[0]) == [100 + rank for rank in range(size)]
    assert [peer.rank for peer in members[0].peers] == list(range(size))
    assert members[0].attempt


def test_incomplete_before_all_ranks_are_present() -> None:
    store = Store()
    members = [Membership(store, process(rank, rank), 3) for rank in (0, 2)]
    assert not any(member.poll() for member in 5 * members)
    assert members[0].missing() == [1]
    assert members[1].missing() == [0]  # they know only rank 0
    complete_all([*members, Membership(store, process(1, 1), 3)])


def test_rank_zero_starts_last() -> None:
    store = Store()
    others = [Membership(store, process(rank, rank), 3) for rank in (1, 2)]
    assert not any(member.poll() for member in 5 * others)
    complete_all([*others, Membership(store, process(0, 0), 3)])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 3), (2, 4), (4, 2), (3, 1), (1, 3)])
def test_the_store_has_keys_of_a_dead_attempt(before: int, after: int) -> None:
    """Also with another world size."""
    store = Store()
    dead = group(store, before)
    complete_all(dead)
    members = group(store, after, first_pid=200)
    complete_all(members)
    assert members[0].attempt != dead[0].attempt
    assert pids(members[0]) == [200 + rank for rank in range(after)]


def test_dead_ranks_do_not_count() -> None:
    store = Store()
    complete_all(group(store, 3))
    alone = Membership(store, process(0, 200), 3)
    assert not any(alone.poll() for _ in range(5))
    assert alone.missing() == [1, 2]
    orphan = Membership(store, process(1, 201), 3)
    assert not any(member.poll() for member in 5 * [orphan, alone])
    assert alone.missing() == [2]


def test_rank_zero_died_after_it_answered() -> None:
    store = Store()
    dead, one, two = group(store, 3)
    assert not any(member.poll() for member in (dead, one, dead, one))  # rank 1 knows no more than this
    again = Membership(store, process(0, 200), 3)
    complete_all([one, two, again])
    assert one.attempt == again.attempt != dead.attempt
    assert pids(two) == [200, 101, 102]


def test_a_rank_died_before_it_acknowledged() -> None:
    store = Store()
    zero, _, two = group(store, 3)
    assert not any(member.poll() for member in (zero, two, zero, two))
    complete_all([zero, two, Membership(store, process(1, 200), 3)])
    assert pids(zero) == [100, 200, 102]


def test_a_rank_died_after_it_acknowledged() -> None:
    """Rank 0 is still waiting for another rank, so it notices, and the new process can join."""
    store = Store()
    zero, one, two = (Membership(store, process(rank, 100 + rank), 4) for rank in range(3))
    assert not any(member.poll() for member in 3 * [zero, one, two])
    assert zero.missing() == [3]
    complete_all([zero, two, Membership(store, process(1, 200), 4), Membership(store, process(3, 103), 4)])
    assert pids(zero) == [100, 200, 102, 103]


def test_join_group() -> None:
    assert join_group(Store(), process(0, 7), 1, where="here", seconds=0).peers == [process(0, 7)]


@pytest.mark.parametrize(
    ("rank", "size", "missing"), [(0, 2, "rank 1"), (0, 4, "rank 1, 3"), (2, 4, "rank 0")]
)
def test_join_group_names_the_missing_ranks(rank: int, size: int, missing: str) -> None:
    store = Store()
    if rank == 0:
        store = Answering(rank=2, size=size)
    with pytest.raises(LaunchError) as caught:
        join_group(store, process(rank, 7), size, where="node1 port 2", seconds=0.05)
    assert str(caught.value) == f"still missing at node1 port 2 after 0 s: {missing}"


class Answering(Store):
    """A store at which one other rank of the group polls whenever the store is asked."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self._other: Membership | None = None
        if rank < size:
            self._other = Membership(self, process(rank, 100 + rank), size)

    def check(self, keys: list[str], /) -> bool:
        other, self._other = self._other, None  # not recursively
        if other is not None:
            other.poll()
        self._other = other
        return super().check(keys)


# ---- Any order of events ---------------------------------------------------------------------------------


class Died(Exception):
    """Raised in a process that dies during its turn."""


class Hosts(Store):
    """Processes that use one store in turn, and start and die in a given order.

    Every access to the store interrupts a turn: there another process has its turn, starts or dies, and so
    may the process whose turn it is.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.alive: dict[int, Membership] = {}
        self.named: dict[str, list[Peer]] = {}
        """The peers of each attempt that some rank completed."""
        self.acknowledged: set[tuple[str, int]] = set()
        """Attempts, and the processes (by pid) that acknowledged them."""
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
            self._turn(rank, lambda: self.alive.update({rank: self._start(rank)}))

    def _start(self, rank: int) -> Membership:
        return Membership(self, process(rank, self._pids[rank]), self.size)

    def die(self, rank: int) -> None:
        self._pids.pop(rank, None)
        self.alive.pop(rank, None)

    def turn(self, rank: int) -> None:
        if rank in self.alive and rank not in [r for r, _ in self._turns]:
            self._turn(rank, lambda: self._poll(rank))

    def round(self, first: int) -> None:
        """Give all ranks a turn."""
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

    def _poll(self, rank: int) -> None:
        member = self.alive[rank]
        if not member.poll():
            return
        assert [peer.rank for peer in member.peers] == list(range(self.size))
        assert member.peers[rank].pid == self._pids[rank]
        assert self.named.setdefault(member.attempt, member.peers) == member.peers
        others = {(member.attempt, peer.pid) for peer in member.peers[1:]}
        assert others <= self.acknowledged, "a rank is counted that does not know it"

    def _interrupt(self) -> None:
        """Before each access to the store: run another event, which may end this process."""
        if self._events and len(self._turns) < 4:
            self._next()
        if not self._lives(*self._turns[-1]):
            raise Died

    def pid(self, rank: int) -> int:
        return self._pids[rank]

    def _lives(self, rank: int, pid: int) -> bool:
        return self._pids.get(rank) == pid

    def set(self, key: str, value: str, /) -> None:
        self._interrupt()
        super().set(key, value)
        attempt, _, rest = key.partition("/")
        if rest.startswith("here/"):
            self.acknowledged.add((attempt, self._turns[-1][1]))

    def get(self, key: str, /) -> bytes:
        self._interrupt()
        return super().get(key)

    def check(self, keys: list[str], /) -> bool:
        self._interrupt()
        return super().check(keys)

    def complete(self) -> bool:
        """Whether some rank 0 has completed an attempt."""
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
    """All complete ranks of an attempt agree, and a group of living processes completes."""
    hosts = Hosts(size)
    for rank in order[:number_at_first]:
        hosts.come(rank % size)
    hosts.happen(events)
    if hosts.complete():  # some may be gone now: their launcher restarts all, perhaps with another size
        for rank in range(size):
            hosts.die(rank)
        hosts.size = size_after
    ranks = [rank for rank in order if rank < hosts.size]
    for rank in ranks:
        hosts.come(rank)
    members = [hosts.alive[rank] for rank in sorted(ranks)]
    for _ in range(5):
        for rank in ranks:
            hosts.turn(rank)
    assert {member.attempt for member in members} == {members[0].attempt}
    for member in members:
        assert pids(member) == [hosts.pid(rank) for rank in sorted(ranks)]
