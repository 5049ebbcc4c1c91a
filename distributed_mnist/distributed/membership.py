"""Determine which processes are in the group, through a store that may be older than the group.

torchrun's agent keeps the same store across restarts. So a new attempt finds keys from dead processes in
it, and a backend that reads the address of a dead process hangs. To avoid this, every process writes a
fresh random token. Rank 0 answers each token with the name of the current attempt, and counts a rank as
present only after the rank has acknowledged that name. All other keys of an attempt have its name as a
prefix.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, Self

from ..common.placement import Placement
from ..errors import LaunchError
from .port_discovery import address_towards


class KeyValueStore(Protocol):
    """The methods of torch's `Store` that this package uses.

    `check` says whether all keys exist. `get` and `multi_get` wait for keys that do not exist yet.
    """

    def set(self, key: str, value: str, /) -> object: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...  # noqa: D102


@dataclass(frozen=True)
class Peer:
    """One process of the group. It is sent as JSON through the store: the field names are a wire format."""

    rank: int
    host: str
    pid: int
    address: str = ""
    """The host's address on the route to rank 0's host; empty if all ranks are on one host."""
    starter: str = ""
    """The `launcher_id` from the process's `Placement`."""
    port: int = 0
    """The port on which the process accepts connections; 0 if it accepts none."""

    @classmethod
    def here(cls, placement: Placement, port: int = 0) -> Self:
        """Describe this process."""
        one_host = placement.local_size == placement.size
        address = "" if one_host else address_towards(placement.host)
        return cls(placement.rank, socket.gethostname(), os.getpid(), address, placement.launcher_id, port)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Membership:
    """One rank's side of the protocol. Call `poll` until it returns True.

    Attributes, valid once `poll` has returned True: `attempt`, the name of the current attempt (on rank 0
    it is valid from the start); `peers`, all ranks in order.
    """

    def __init__(self, store: KeyValueStore, me: Peer, size: int) -> None:
        self._store, self._rank, self._size = store, me.rank, size
        self._token = secrets.token_hex(8)
        self.attempt = self._token if me.rank == 0 else ""
        self.peers: list[Peer] = []
        self._answered: dict[int, str] = {}  # for each rank, the token that was answered
        self._acknowledged: dict[int, Peer] = {me.rank: me}
        store.set(f"hello/{me.rank}", json.dumps([self._token, asdict(me)]))

    def poll(self) -> bool:
        """Advance the protocol without waiting. Return True once the membership is complete."""
        return self._poll_rank_zero() if self._rank == 0 else self._poll_other_rank()

    def missing(self) -> Sequence[int]:
        """Return the ranks that have not acknowledged the attempt.

        On ranks other than 0 this is just rank 0, the only one they can see.
        """
        if self._rank > 0:
            return [0]
        return [rank for rank in range(self._size) if rank not in self._acknowledged]

    def _poll_rank_zero(self) -> bool:
        for rank in range(1, self._size):
            if rank not in self._acknowledged:
                self._look_for(rank)
        if len(self._acknowledged) == self._size:  # check again: an early rank may have died and restarted
            for rank in range(1, self._size):
                self._look_for(rank)
        if len(self._acknowledged) < self._size:
            return False
        self.peers = [self._acknowledged[rank] for rank in range(self._size)]
        self._store.set(f"{self.attempt}/all", json.dumps([asdict(peer) for peer in self.peers]))
        return True

    def _look_for(self, rank: int) -> None:
        if not self._store.check([f"hello/{rank}"]):
            return
        token, peer = json.loads(self._store.get(f"hello/{rank}"))
        if self._answered.get(rank) != token:  # a new process, perhaps in the place of a dead one
            self._store.set(f"answer/{token}", self.attempt)
            self._answered[rank] = token
            self._acknowledged.pop(rank, None)
        if self._store.check([f"{self.attempt}/here/{token}"]):
            self._acknowledged[rank] = Peer(**peer)

    def _poll_other_rank(self) -> bool:
        if not self._store.check([f"answer/{self._token}"]):
            return False
        attempt = self._store.get(f"answer/{self._token}").decode()
        if attempt != self.attempt:  # the first answer, or the answer of a restarted rank 0
            self._store.set(f"{attempt}/here/{self._token}", "")
            self.attempt = attempt
        if not self._store.check([f"{attempt}/all"]):
            return False
        self.peers = [Peer(**peer) for peer in json.loads(self._store.get(f"{attempt}/all"))]
        return True


def join_group(store: KeyValueStore, me: Peer, size: int, *, where: str, seconds: float) -> Membership:
    """Wait until the membership is complete. Raises `LaunchError`, naming missing ranks, after `seconds`.

    A backend would also wait, but inside C++, where no signal handler runs, and without naming a rank.
    """
    membership = Membership(store, me, size)
    deadline = time.monotonic() + seconds
    while not membership.poll():
        if time.monotonic() > deadline:
            absent = ", ".join(map(str, membership.missing()))
            raise LaunchError(f"still missing at {where} after {seconds:.0f} s: rank {absent}")
        time.sleep(0.005)
    return membership
