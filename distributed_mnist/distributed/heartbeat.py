"""Describe a rank's state in a heartbeat, and diagnose a group that makes no progress.

This file contains no threads; `watchdog` has them.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..common.printable import printable
from .peer import Peer

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = (sys.base_prefix, sys.prefix, "<")
_CHECKS_APART = 0.5  # seconds; the checks of different ranks are at most about this far apart


@dataclass(frozen=True)
class Heartbeat:
    """The activity of a rank at one moment, sent to the other ranks through the coordinator."""

    number: int
    """Sequence number. A repeated number means that no new heartbeat has arrived."""
    phase: str
    step: int
    waiting: str | None
    """The collective in which the rank waits for others; None if it does not wait."""
    idle: float
    """Seconds since the main thread last made progress."""
    patience: float
    """Seconds that this phase may go without progress."""
    where: str
    """The line of the user's model or of this program that the main thread is executing."""
    clock: str
    """Time of day on the rank's host, as HH:MM:SS."""


class RankStatus:
    """The current phase and step of a rank, and what it waits for. Heartbeats are made from this.

    The main thread writes and the watchdog's threads read. Every write is a single assignment, so no lock
    is needed. Each method resets `last_progress` first. So a reader between two assignments sees the old
    phase with an idle time of zero, and never the new phase with the idle time of the old one.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience  # in an ordinary phase
        self.phase, self.step, self.patience = "starting", 0, patience
        self.waiting: str | None = None
        self.last_progress = time.monotonic()

    def enter(self, phase: str, *, patience: float | None = None) -> None:
        """Begin a phase that may go `patience` seconds without progress (at least the usual time)."""
        self.last_progress = time.monotonic()
        self.phase, self.patience = phase, max(patience or 0.0, self._patience)

    @contextlib.contextmanager
    def during(self, phase: str, patience: float) -> Iterator[None]:
        """Enter this phase for the duration of the `with` block, then return to the previous one."""
        before = self.phase, self.patience
        self.enter(phase, patience=patience)
        try:
            yield
        finally:
            self.enter(before[0], patience=before[1])

    def made_progress(self) -> None:
        """Record progress within the phase."""
        self.last_progress = time.monotonic()

    def begin_step(self, step: int) -> None:
        """Record that this training step begins."""
        self.last_progress = time.monotonic()
        self.step = step

    def set_waiting(self, collective: str | None) -> None:
        """Record that the rank waits for others in a collective, or (None) that the wait is over."""
        self.last_progress = time.monotonic()
        self.waiting = collective

    def discount(self, seconds: float) -> None:
        """Do not count these seconds as idle: the whole process was suspended, for example by Ctrl-Z."""
        self.last_progress = min(self.last_progress + seconds, time.monotonic())

    def heartbeat(self, number: int, main_thread: int) -> Heartbeat:
        """Return a heartbeat for the current moment. `main_thread` is the main thread's identifier."""
        idle = time.monotonic() - self.last_progress
        where = _user_line(sys._current_frames().get(main_thread)) if idle > 1 else ""
        clock = time.strftime("%H:%M:%S")
        return Heartbeat(number, self.phase, self.step, self.waiting, idle, self.patience, where, clock)


def _user_line(frame: FrameType | None) -> str:
    """Return the innermost line of the stack in the user's model or in this program, not in a library."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) or not ("site-packages" in file or file.startswith(_LIBRARIES)):
            return printable(f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class ReceivedHeartbeat:
    """The latest heartbeat of another rank, and when it arrived, by this rank's monotonic clock."""

    heartbeat: Heartbeat
    at: float


def diagnose(
    me: int,
    peers: Sequence[Peer],
    received: Mapping[int, ReceivedHeartbeat],
    *,
    last_contact: float,
    now: float,
    limit: float,
    silence: float,
    where: str,
    asynchronous: bool = False,
) -> tuple[str, int] | None:
    """Explain in one sentence why the group makes no progress, and choose the rank that reports it.

    Returns None if there is no problem yet. `received` has the latest heartbeat of every rank, including
    `me`. `last_contact` is the time when rank 0 (at address `where`) last answered. A rank examines the
    others only after it has made no progress itself for `limit` seconds. A rank without a new heartbeat for
    `silence` seconds is stopped or cannot be reached. On asynchronous devices the main thread runs ahead of
    the device, so a rank that waits for others cannot be distinguished from a rank that is stuck.
    """
    mine = received[me].heartbeat
    waited = mine.idle + now - received[me].at
    if waited < limit or not (mine.waiting or (asynchronous and waited >= mine.patience)):
        return None
    place = f"in {mine.waiting or 'a step'}, at step {mine.step}"
    wait = f"; rank {me} waited {waited:.0f} s for it {place} (--hang-after {limit:g})"
    if now - last_contact > silence:
        known = received.get(0)
        last = f": last heartbeat: {_activity(known.heartbeat)}" if known and me != 0 else ""
        return f"{peers[0]} is stopped or cannot be reached (at {where}){last}{wait}", me
    suspects: list[str] = []
    waiting: dict[int, float] = {}
    for rank, peer in enumerate(peers):
        known = received.get(rank)
        if known is None or now - known.at > silence:
            last = "no heartbeat"
            if known:
                last = f"{_activity(known.heartbeat)}, last heartbeat at {known.heartbeat.clock}"
            suspects.append(f"{peer} is stopped or cannot be reached: {last}")
            continue
        heartbeat = known.heartbeat
        idle = heartbeat.idle + now - known.at
        overdue = idle >= 0.9 * heartbeat.patience
        if heartbeat.waiting or (asynchronous and overdue):
            waiting[rank] = idle
        elif overdue:
            line = f", in {heartbeat.where}" if heartbeat.where else ""
            suspects.append(f"{peer} has made no progress for {idle:.0f} s: {_activity(heartbeat)}{line}")
    # Do not choose a rank that began to wait later: it has no diagnosis yet, and would be ended before it
    # could report one.
    reporter = min((rank for rank, idle in waiting.items() if idle >= limit - _CHECKS_APART), default=me)
    if suspects:
        return f"{'; '.join(suspects)}{wait}", reporter
    # A rank that does not wait is busy, and still within its time limit. A rank that has only just reached
    # the collective may be the one that all others waited for.
    if len(waiting) < len(peers) or min(waiting.values()) < 0.9 * limit:
        return None
    if waited < mine.patience:
        return None  # this phase may take longer, for example the rendezvous of a large group
    places = ", ".join(_place(peer, received[peer.rank].heartbeat) for peer in peers[:8])
    cause = "a connection between them is cut, or they call different collectives"
    return f"no rank makes progress, though all are alive ({places}): {cause}", reporter


def _activity(heartbeat: Heartbeat) -> str:
    return f"{heartbeat.phase}, step {heartbeat.step}"


def _place(peer: Peer, heartbeat: Heartbeat) -> str:
    activity = f"in {heartbeat.waiting}" if heartbeat.waiting else heartbeat.phase
    line = f" ({heartbeat.where})" if heartbeat.where else ""
    return f"{peer} {activity}{line} at step {heartbeat.step}"
