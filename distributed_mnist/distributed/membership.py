"""How a group finds itself at a store that may outlive it.

torchrun's agent keeps one store through all restarts, so a new attempt meets what dead processes wrote
there; a backend that reads a dead one's address hangs. Here every process comes with a token that nobody
had before, rank 0 answers each with the name of this attempt, and only who acknowledged that name is
counted. What an attempt writes goes under its name.
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


class KeyValues(Protocol):
    """The part of torch's `Store` that is used here."""

    def set(self, key: str, value: str, /) -> object:
        """Put a value."""
        ...

    def get(self, key: str, /) -> bytes:
        """A value that is there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them are there."""
        ...


@dataclass(frozen=True)
class Peer:
    """One process of the group, as people look for it."""

    rank: int
    host: str
    pid: int
    address: str = ""
    """Of its host, on the way to rank 0's; empty on that host itself."""
    starter: str = ""
    """See `Placement`."""
    port: int = 0
    """Where it can be reached there, if it listens."""

    @classmethod
    def here(cls, placement: Placement, port: int = 0) -> Self:
        """This process."""
        one_host = placement.local_size == placement.size
        address = "" if one_host else address_towards(placement.host)
        return cls(placement.rank, socket.gethostname(), os.getpid(), address, placement.starter, port)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Membership:
    """One rank's part in meeting the others; `finish` is called until it returns true."""

    def __init__(self, store: KeyValues, me: Peer, size: int) -> None:
        self._store, self._rank, self._size = store, me.rank, size
        self._token = secrets.token_hex(8)
        self.attempt = self._token if me.rank == 0 else ""
        """The name of this attempt; on other ranks than 0 known when the roll call is over."""
        self.peers: list[Peer] = []
        """All ranks; known when the roll call is over."""
        self._answered: dict[int, str] = {}
        self._came: dict[int, Peer] = {me.rank: me}
        store.set(f"hello/{me.rank}", json.dumps([self._token, asdict(me)]))

    def finish(self) -> bool:
        """Do what can be done now; whether every rank is there and knows it."""
        return self._call() if self._rank == 0 else self._answer()

    def missing(self) -> Sequence[int]:
        """On rank 0 the ranks that have not acknowledged; elsewhere nobody but rank 0 knows, so rank 0."""
        return [r for r in range(self._size) if r not in self._came] if self._rank == 0 else [0]

    def _call(self) -> bool:
        for rank in range(1, self._size):
            if rank not in self._came:
                self._look_for(rank)
        if len(self._came) == self._size:  # another look: who came early may have died and come again
            for rank in range(1, self._size):
                self._look_for(rank)
        if len(self._came) < self._size:
            return False
        self.peers = [self._came[rank] for rank in range(self._size)]
        self._store.set(f"{self.attempt}/all", json.dumps([asdict(peer) for peer in self.peers]))
        return True

    def _look_for(self, rank: int) -> None:
        if not self._store.check([f"hello/{rank}"]):
            return
        token, peer = json.loads(self._store.get(f"hello/{rank}"))
        if self._answered.get(rank) != token:  # the first we see of it, or it took a dead one's place
            self._store.set(f"answer/{token}", self.attempt)
            self._answered[rank] = token
            self._came.pop(rank, None)
        if self._store.check([f"{self.attempt}/here/{token}"]):
            self._came[rank] = Peer(**peer)

    def _answer(self) -> bool:
        if not self._store.check([f"answer/{self._token}"]):
            return False
        attempt = self._store.get(f"answer/{self._token}").decode()
        if attempt != self.attempt:  # a rank 0 that died meanwhile may have answered before
            self._store.set(f"{attempt}/here/{self._token}", "")
            self.attempt = attempt
        if not self._store.check([f"{attempt}/all"]):
            return False
        self.peers = [Peer(**peer) for peer in json.loads(self._store.get(f"{attempt}/all"))]
        return True


def meet(store: KeyValues, me: Peer, size: int, *, where: str, seconds: float) -> Membership:
    """The finished roll call of a group. Raises `LaunchError`, naming who is missing, after `seconds`.

    A backend would wait as well, but inside of C++, where no signal is heard, and would name nobody.
    """
    call = Membership(store, me, size)
    deadline = time.monotonic() + seconds
    while not call.finish():
        if time.monotonic() > deadline:
            absent = ", ".join(map(str, call.missing()))
            raise LaunchError(f"still missing at {where} after {seconds:.0f} s: rank {absent}")
        time.sleep(0.005)
    return call
