"""What a rank is doing, as it tells the others, and what they make of it when nothing moves.

Everything here is plain values and pure functions; `watch.py` has the threads.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from .membership import Peer

_OWN = str(Path(__file__).parents[1])
_LIBRARIES = (sys.base_prefix, sys.prefix, "<")
_SOON = 0.5  # seconds: within about this all ranks look


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: what a rank was doing at `clock`, by its own clock."""

    number: int
    """Counts the signs, so that one that is repeated is known to be old."""
    phase: str
    step: int
    waiting: str | None
    """The collective in which it waits for others."""
    idle: float
    """Seconds since its main thread last got further."""
    patience: float
    """Seconds that this phase may take without getting further."""
    where: str
    """The line of the model or of the program that its main thread is in."""
    clock: str

    def encode(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "Heartbeat":
        """The inverse of `encode`."""
        return cls(**json.loads(text))


class RankStatus:
    """Kept by a rank's main thread, read by its watching threads; single assignments, so no lock.

    The clock is set back first: read in between, the rank has just begun what it did before.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience  # of an ordinary phase
        self.phase, self.step, self.patience = "starting", 0, patience
        self.waiting: str | None = None
        self.since = time.monotonic()

    def enter(self, phase: str, *, patience: float | None = None) -> None:
        """From now on the rank is in this phase, which may take long without getting further."""
        self.since = time.monotonic()
        self.phase, self.patience = phase, max(patience or 0.0, self._patience)

    @contextlib.contextmanager
    def during(self, phase: str, patience: float) -> Iterator[None]:
        """In this phase for a while, and then in the one before again."""
        before = self.phase, self.patience
        self.enter(phase, patience=patience)
        try:
            yield
        finally:
            self.enter(before[0], patience=before[1])

    def moved(self) -> None:
        """The rank got further, within its phase."""
        self.since = time.monotonic()

    def at(self, step: int) -> None:
        """The rank begins this step."""
        self.since = time.monotonic()
        self.step = step

    def wait(self, what: str | None) -> None:
        """The rank begins to wait for others in a collective, or (None) has what it waited for."""
        self.since = time.monotonic()
        self.waiting = what

    def slept(self, seconds: float) -> None:
        """This process was stopped for so long, as by Ctrl-Z: that time does not count."""
        self.since = min(self.since + seconds, time.monotonic())

    def sign(self, number: int, main_thread: int) -> Heartbeat:
        """A sign of life."""
        idle = time.monotonic() - self.since
        where = _place(sys._current_frames().get(main_thread)) if idle > 1 else ""
        clock = time.strftime("%H:%M:%S")
        return Heartbeat(number, self.phase, self.step, self.waiting, idle, self.patience, where, clock)


def _place(frame: FrameType | None) -> str:
    """The innermost line outside of libraries: of a user's model, else of this program."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN) or not ("site-packages" in file or file.startswith(_LIBRARIES)):
            return f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class ReceivedHeartbeat:
    """The last sign of a rank and when, by our own clock (monotonic), it was new to us."""

    sign: Heartbeat
    at: float


def verdict(
    me: int,
    peers: Sequence[Peer],
    heard: Mapping[int, ReceivedHeartbeat],
    *,
    contact: float,
    now: float,
    limit: float,
    silence: float,
    store: str,
    asynchronous: bool = False,
) -> tuple[str, int] | None:
    """Why nothing moves, in a sentence, and the rank that should tell it; None while it is too early.

    `heard` has the latest sign of every rank, `me` included; `contact` is when the store at `store` last
    answered. Everyone is looked at only when this rank itself has got no further for `limit` seconds; who
    was not heard for `silence` seconds is stopped or out of reach. On devices that work by themselves
    (`asynchronous`) a rank that waits for others cannot be told from one that just does not go on.
    """
    mine = heard[me].sign
    waited = mine.idle + now - heard[me].at
    if waited < limit or not (mine.waiting or (asynchronous and waited >= mine.patience)):
        return None
    place = f"in {mine.waiting or 'a step'}, at step {mine.step}"
    for_it = f"; rank {me} waited {waited:.0f} s for it {place} (--hang-after {limit:g})"
    if now - contact > silence:
        host = peers[0]
        known = heard.get(0)
        last = f": last heard of while {_doing(known.sign)}" if known and me != 0 else ""
        return f"{host} is stopped or cannot be reached (its store at {store}){last}{for_it}", me
    suspects: list[str] = []
    waiting: dict[int, float] = {}
    for rank, peer in enumerate(peers):
        known = heard.get(rank)
        if known is None or now - known.at > silence:
            last = f"{_doing(known.sign)}, last sign of life at {known.sign.clock}" if known else "no sign"
            suspects.append(f"{peer} is stopped or cannot be reached: {last}")
            continue
        idle = known.sign.idle + now - known.at
        overdue = idle >= 0.9 * known.sign.patience
        if known.sign.waiting or (asynchronous and overdue):
            waiting[rank] = idle
        elif overdue:
            where = f" in {known.sign.where}" if known.sign.where else ""
            suspects.append(f"{peer} does not go on: {_doing(known.sign)} for {idle:.0f} s{where}")
    # One of those who find it out now: who began to wait later would not be in time to tell.
    teller = min((rank for rank, idle in waiting.items() if idle >= limit - _SOON), default=me)
    if suspects:
        return f"{'; '.join(suspects)}{for_it}", teller
    if len(waiting) < len(peers) or min(waiting.values()) < 0.9 * limit:
        return None  # who does not wait is busy, and may be; who came late may be all that was waited for
    if waited < mine.patience:
        return None  # a phase that may take long: a large group's first meeting
    stands = ", ".join(_stands(peer, heard[peer.rank].sign) for peer in peers[:8])
    why = "a connection between them is cut, or they disagree about what comes next"
    return f"no rank goes on, though all are alive ({stands}): {why}", teller


def _doing(sign: Heartbeat) -> str:
    return f"{sign.phase}, step {sign.step}"


def _stands(peer: Peer, sign: Heartbeat) -> str:
    place = " ".join(
        [
            f"in {sign.waiting}" if sign.waiting else sign.phase,
            *([f"({sign.where})"] if sign.where else []),
        ]
    )
    return f"{peer} {place} at step {sign.step}"
