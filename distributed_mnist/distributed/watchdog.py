"""Finds a rank that stopped without dying, and says which: two small threads beside the main one.

A collective waits inside of C++, on some backends for half an hour, and its time-out names nobody. One
thread here puts a sign of life into the group's store and reads the others', the other looks at them when
the main thread has got no further for too long. Two, because a store whose host is cut off never answers.
"""

import os
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from ..common.placement import Placement
from ..errors import Hang, tell
from .heartbeat import Heartbeat, RankStatus, ReceivedHeartbeat, verdict
from .membership import Peer


class HeartbeatStore(Protocol):
    """The part of torch's `Store` that is used here; a client of its own, for it may block."""

    def set(self, key: str, value: str, /) -> object:
        """Put a value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them are there."""
        ...

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Values, waiting for those that are not there yet."""
        ...


class Watchdog:
    """From `start` to `stop`, ends this process with one line when the group does not go on.

    `limit` is in seconds; the group's ranks must agree on it. `where` names the store in messages.
    """

    def __init__(
        self,
        placement: Placement,
        peers: Sequence[Peer],
        status: RankStatus,
        store: HeartbeatStore,
        *,
        limit: float,
        where: str,
        asynchronous: bool,
    ) -> None:
        self._placement, self._peers, self._vitals, self._store = placement, peers, status, store
        self._limit, self._where, self._asynchronous = limit, where, asynchronous
        # All read all: in large groups less often, or rank 0's host would do nothing else.
        self._tick = max(min(1.0, limit / 8), len(peers) / 64)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._heard: dict[int, ReceivedHeartbeat] = {}
        self._contact = time.monotonic()

    def start(self) -> None:
        """Called by the main thread, whose waits are watched."""
        for target in (self._tell_and_listen, self._judge):
            threading.Thread(target=target, name=f"dmnist{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        """The group is about to part."""
        self._over.set()

    def _tell_and_listen(self) -> None:
        keys = [f"life/{rank}" for rank in range(len(self._peers))]
        there: list[int] = []  # who has given a sign: the store would wait for the others
        number = 0
        while not self._over.is_set():
            number += 1
            sign = self._vitals.sign(number, self._main)
            try:
                self._store.set(keys[self._placement.rank], sign.encode())
                absent = [rank for rank in range(len(keys)) if rank not in there]
                there += [rank for rank in absent if self._store.check([keys[rank]])]
                texts = self._store.multi_get([keys[rank] for rank in there])
            except RuntimeError:  # the connection broke: `_contact` grows old
                self._over.wait(self._tick)
                continue
            self._contact = now = time.monotonic()
            for rank, text in zip(there, texts, strict=True):
                sign = Heartbeat.decode(text)
                known = self._heard.get(rank)
                if known is None or known.sign.number != sign.number:
                    self._heard[rank] = ReceivedHeartbeat(sign, now)
            self._over.wait(self._tick)

    def _judge(self) -> None:
        me = self._placement.rank
        tick = min(0.5, self._limit / 8)
        looked = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            if (slept := now - looked - tick) > tick:  # Ctrl-Z, a suspended job: nobody is to blame
                self._awake(slept)
            looked = now
            mine = ReceivedHeartbeat(self._vitals.sign(0, self._main), now)
            found = verdict(
                me,
                self._peers,
                {**self._heard, me: mine},
                contact=self._contact,
                now=now,
                limit=self._limit,
                silence=max(self._limit / 2, 3 * self._tick),
                store=self._where,
                asynchronous=self._asynchronous,
            )
            if found is not None:
                self._end(*found)

    def _awake(self, slept: float) -> None:
        self._vitals.slept(slept)
        now = time.monotonic()
        self._contact = min(self._contact + slept, now)
        heard = self._heard.copy()  # at once: the other thread goes on adding
        self._heard = {
            rank: ReceivedHeartbeat(one.sign, min(one.at + slept, now)) for rank, one in heard.items()
        }

    def _end(self, text: str, teller: int) -> None:
        error = Hang(text)
        if teller == self._placement.rank:
            tell(error, self._placement)
        else:
            self._over.wait(1)  # a launcher ends the rest when the first has gone: the one who tells
        if not self._over.is_set():
            os._exit(error.exit_code)
