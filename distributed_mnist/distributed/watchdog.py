"""Detect a rank that hangs, and report which one.

A collective waits inside C++, on some backends for half an hour, and its timeout message names no rank. So
each rank runs two threads in addition to the main thread. The first sends this rank's heartbeat to the
coordinator and receives the heartbeats of the others. The second checks them when the main thread has made
no progress for too long. There are two because the first can block: a coordinator whose host is cut off
never answers.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..common.placement import Placement
from ..errors import Hang, print_error
from .heartbeat import Heartbeat, RankStatus, ReceivedHeartbeat, diagnose
from .peer import Peer


class Watchdog:
    """From `start` to `stop`, end this process with one line if the group makes no progress.

    `exchange` sends this rank's heartbeat and returns the latest one of every rank that has sent one. It
    may block, and it raises `OSError` or `ValueError` once the coordinator is gone. `limit` is in seconds,
    the same on all ranks. `where` is the coordinator's address for messages.
    """

    def __init__(
        self,
        placement: Placement,
        peers: Sequence[Peer],
        status: RankStatus,
        exchange: Callable[[Heartbeat], Mapping[int, Heartbeat]],
        *,
        limit: float,
        where: str,
        asynchronous: bool,
    ) -> None:
        self._placement, self._peers, self._status, self._exchange = placement, peers, status, exchange
        self._limit, self._where, self._asynchronous = limit, where, asynchronous
        # Every rank reads every heartbeat. In large groups it does so less often, or rank 0's host would
        # have no time for anything else.
        self._interval = max(min(1.0, limit / 8), len(peers) / 64)
        self._main_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._received: dict[int, ReceivedHeartbeat] = {}
        self._last_contact = time.monotonic()

    def start(self) -> None:
        """Start both threads. The thread that calls `Watchdog()` and `start` is the one that is watched."""
        for target in (self._exchange_heartbeats, self._check):
            threading.Thread(target=target, name=f"dmnist{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: the group is about to end."""
        self._stopped.set()

    def _exchange_heartbeats(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            try:
                heartbeats = self._exchange(self._status.heartbeat(number, self._main_thread))
            except (OSError, ValueError):  # the connection broke; `_last_contact` keeps its old value
                return
            self._last_contact = now = time.monotonic()
            for rank, heartbeat in heartbeats.items():
                known = self._received.get(rank)
                if known is None or known.heartbeat.number != heartbeat.number:
                    self._received[rank] = ReceivedHeartbeat(heartbeat, now)
            self._stopped.wait(self._interval)

    def _check(self) -> None:
        me = self._placement.rank
        interval = min(0.5, self._limit / 8)
        checked = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            # After Ctrl-Z, or in a suspended job, all heartbeats are old, but no rank is at fault.
            if (suspended := now - checked - interval) > interval:
                self._discount(suspended)
            checked = now
            mine = ReceivedHeartbeat(self._status.heartbeat(0, self._main_thread), now)
            diagnosis = diagnose(
                me,
                self._peers,
                {**self._received, me: mine},
                last_contact=self._last_contact,
                now=now,
                limit=self._limit,
                silence=max(self._limit / 2, 3 * self._interval),
                where=self._where,
                asynchronous=self._asynchronous,
            )
            if diagnosis is not None:
                self._end_process(*diagnosis)

    def _discount(self, suspended: float) -> None:
        """Move all recorded times forward by the seconds for which this process was suspended."""
        self._status.discount(suspended)
        now = time.monotonic()
        self._last_contact = min(self._last_contact + suspended, now)
        received = self._received.copy()  # atomic: the other thread keeps adding
        self._received = {
            rank: ReceivedHeartbeat(known.heartbeat, min(known.at + suspended, now))
            for rank, known in received.items()
        }

    def _end_process(self, message: str, reporter: int) -> None:
        error = Hang(message)
        if reporter == self._placement.rank:
            print_error(error, self._placement)
        else:
            self._stopped.wait(1)  # exit after the reporter: when one exits, a launcher ends the others
        if not self._stopped.is_set():
            os._exit(error.exit_code)
