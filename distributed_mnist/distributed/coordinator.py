"""Coordinate a group: the ranks meet at rank 0, and later exchange heartbeats there.

The coordinator runs on rank 0, in the thread of its `Listener`. Every rank holds one connection to it and
sends requests, each answered by one reply. A rank is present as long as its connection is open. Before the
group is complete, a dead rank's place is thus free for the process that replaces it. Afterwards nobody can
join any more: a process that is too late, or that was started again, is turned away and tries again, until
it finds the next attempt's rank 0.
"""

import asyncio
import contextlib
import hmac
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ..common.messages import decode, encode
from ..errors import UsageError
from . import authentication
from .authentication import SIGNATURE_BYTES, Claim, NotOurs, Purpose, signature
from .heartbeat import Heartbeat
from .listener import receive_exactly
from .peer import JobDescription, Peer, job_differences

_LENGTH = struct.Struct("<I")
_SILENT_SECONDS = 15.0  # after which a rank that does not ask any more is missing again
_LONGEST = 2**24  # bytes of a message; the heartbeats of ten thousand ranks are shorter
_MOST_REPORTS = 8


@dataclass(frozen=True)
class Membership:
    """What the coordinator knows about the group."""

    attempt: bytes
    """The random name of this attempt: 16 bytes."""
    missing: list[int]
    """The ranks that are not present; empty once the group is complete."""
    peers: list[Peer]
    """All ranks in order; empty until the group is complete."""


@dataclass(frozen=True)
class JoinRequest:
    """What a rank says about itself and about its job."""

    peer: Peer
    job: dict[str, str]
    failure: tuple[str, str] | None = None
    """Why this rank cannot take part, see `errors.described`; None if it can."""


@dataclass(frozen=True)
class Refusal:
    """Why a process may not join."""

    reason: str
    final: bool
    """Whether the process would wait in vain, because it belongs to another job or the group has failed."""
    failure: tuple[str, str] | None = None
    """Why the group cannot start, see `errors.described`; None if it can."""


@dataclass(frozen=True)
class JoinReply:
    """One of the two."""

    membership: Membership | None = None
    refusal: Refusal | None = None


class TurnedAway(ConnectionError):
    """Rank 0 does not let this process join. `final` and `failure` are as in `Refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal, self.final, self.failure = refusal, refusal.final, refusal.failure


class Coordinator:
    """The coordinator of a group of `size` ranks. Its methods may be called from any thread.

    `job` describes the job of rank 0. `report` is called with a message about each process of another job.
    """

    def __init__(self, size: int, job: JobDescription, report: Callable[[str], object]) -> None:
        self._size, self._job, self._report = size, job, report
        self._attempt = authentication.new_attempt()
        self._lock = threading.Lock()
        self._failure: Refusal | None = None
        self._told: set[int] = set()  # ranks that know of the failure
        self._present: dict[int, Peer] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self._reported: set[tuple[str, int]] = set()

    def join(self, peer: Peer, job: JobDescription) -> Membership:
        """Count a rank as present, in place of an earlier process with the same rank.

        Raises `TurnedAway` for a process of another job, and if the group is complete without this process.
        """
        if self._failure is not None:
            raise TurnedAway(self._failure)
        if different := job_differences(self._job, job):
            first = self._present.get(0)
            if first and peer.starter and peer.starter == first.starter:  # started together
                self.fail(peer, (UsageError.__name__, f"it has other flags: {different}"))
            self._report_stranger(peer, job_differences(job, self._job))
            raise TurnedAway(Refusal(f"{self._who} belongs to another job: {different}", final=True))
        with self._lock:
            if len(self._present) < self._size and 0 <= peer.rank < self._size:
                self._present[peer.rank] = peer
            if self._present.get(peer.rank) != peer:
                raise TurnedAway(
                    Refusal(f"the group of {self._who} is complete without this process", final=False)
                )
            missing = [rank for rank in range(self._size) if rank not in self._present]
            peers = [] if missing else [self._present[rank] for rank in range(self._size)]
            return Membership(self._attempt, missing, peers)

    def fail(self, peer: Peer, failure: tuple[str, str]) -> NoReturn:
        """Record that a rank cannot take part. Raises `TurnedAway`, as `join` does from now on.

        A group that is complete does not fail any more. Nor does it because of a process whose rank another
        process has taken: that one belongs to another job.
        """
        name, message = failure
        text = f"{peer} cannot take part: {message}"
        with self._lock:
            taken = self._present.get(peer.rank, peer)
            if (taken.host, taken.pid) != (peer.host, peer.pid):
                raise TurnedAway(Refusal(f"{taken} takes part in its place", final=True))
            if self._failure is None and len(self._present) < self._size:
                self._failure = Refusal(text, final=True, failure=(name, text))
        raise TurnedAway(self._failure or Refusal(f"the group of {self._who} is complete", final=True))

    def everyone_knows(self) -> bool:
        """Return whether all other ranks have been told that the group has failed."""
        return len(self._told) >= self._size - 1

    @property
    def _who(self) -> str:
        return str(self._present.get(0, "rank 0"))

    def _report_stranger(self, peer: Peer, different: str) -> None:
        if (peer.host, peer.pid) not in self._reported and len(self._reported) < _MOST_REPORTS:
            self._reported.add((peer.host, peer.pid))
            self._report(f"{peer} belongs to another job and was turned away: {different}")

    def leave(self, peer: Peer) -> None:
        """Forget a rank that is gone, unless the group is complete."""
        with self._lock:
            if len(self._present) < self._size and self._present.get(peer.rank) == peer:
                del self._present[peer.rank]

    def exchange(self, rank: int, heartbeat: Heartbeat) -> Mapping[int, Heartbeat]:
        """Store a rank's heartbeat and return the latest one of every rank that has sent one."""
        with self._lock:
            self._heartbeats[rank] = heartbeat
            return self._heartbeats.copy()

    async def serve(self, rank: int, connection: socket.socket, session: bytes) -> None:
        """Answer the requests of a rank until its connection ends. Messages are signed with `session`."""
        channel = _Channel(connection, session)
        with contextlib.suppress(OSError, ValueError):  # it is gone, or it is no rank of this version
            await self._serve_join(rank, channel)
            while True:
                heartbeat = decode(await channel.receive(), Heartbeat)
                await channel.send(encode(self.exchange(rank, heartbeat)))

    async def _serve_join(self, rank: int, channel: "_Channel") -> None:
        membership, peer = None, None
        try:
            while membership is None or membership.missing:
                async with asyncio.timeout(_SILENT_SECONDS):
                    request = decode(await channel.receive(), JoinRequest)
                if request.peer.rank != rank:
                    raise NotOurs("a rank speaks for another one")
                peer = request.peer
                if request.failure:
                    self.fail(peer, request.failure)
                membership = self.join(peer, request.job)
                await channel.send(encode(JoinReply(membership=membership)))
        except TurnedAway as error:
            await channel.send(encode(JoinReply(refusal=error.refusal)))
            if error.failure:
                self._told.add(rank)
            raise
        finally:
            if peer is not None:
                self.leave(peer)


class _Channel:
    """The coordinator's side of a connection: messages of any length, each with a signature."""

    def __init__(self, connection: socket.socket, session: bytes) -> None:
        self._connection, self._session = connection, session
        self._received = self._sent = 0

    async def receive(self) -> bytes:
        (length,) = _LENGTH.unpack(await receive_exactly(self._connection, _LENGTH.size))
        if length > _LONGEST:
            raise NotOurs("a message is too long")
        message = await receive_exactly(self._connection, length)
        signed = await receive_exactly(self._connection, SIGNATURE_BYTES)
        _check(signed, signature(self._session, b"rank", self._received, message))
        self._received += 1
        return message

    async def send(self, message: bytes) -> None:
        frame = _frame(message, signature(self._session, b"coordinator", self._sent, message))
        self._sent += 1
        await asyncio.get_running_loop().sock_sendall(self._connection, frame)


def _frame(message: bytes, signed: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message + signed


def _check(signed: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(signed, expected):
        raise NotOurs("a message has a wrong signature")


class CoordinatorConnection:
    """A rank's connection to the coordinator. Raises `OSError` where it cannot be reached, or is lost.

    `seconds` is for connecting and for the proof.
    """

    def __init__(self, host: str, port: int, key: bytes, rank: int, *, seconds: float) -> None:
        claim = Claim(Purpose.COORDINATION, rank)
        self._socket, self._session = authentication.connect(host, port, key, claim, seconds)
        self._number = 0
        self.where = f"{host} port {port}"
        self.local_address: str = self._socket.getsockname()[0]

    def join(
        self, peer: Peer, job: JobDescription, failure: tuple[str, str] | None = None, *, seconds: float
    ) -> Membership:
        """Call `Coordinator.join`, or `fail` if there is a failure, and wait for `seconds` at most.

        Raises `TurnedAway`.
        """
        self._socket.settimeout(seconds)
        reply = decode(self._request(encode(JoinRequest(peer, dict(job), failure))), JoinReply)
        self._socket.settimeout(None)
        if reply.membership is None:
            raise TurnedAway(reply.refusal or Refusal("it gives no reason", final=False))
        return reply.membership

    def exchange(self, heartbeat: Heartbeat) -> Mapping[int, Heartbeat]:
        """Call `Coordinator.exchange`. It waits for as long as the coordinator does not answer."""
        return decode(self._request(encode(heartbeat)), dict[int, Heartbeat])

    def _request(self, message: bytes) -> bytes:
        number, self._number = self._number, self._number + 1
        self._socket.sendall(_frame(message, signature(self._session, b"rank", number, message)))
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if length > _LONGEST:
            raise NotOurs("a message is too long")
        reply = self._receive(length)
        _check(self._receive(SIGNATURE_BYTES), signature(self._session, b"coordinator", number, reply))
        return reply

    def _receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self._socket.recv(count - len(received))
            if not part:
                raise NotOurs("it closed the connection")
            received += part
        return bytes(received)

    def close(self) -> None:
        """Close the connection. A call that waits in another thread fails."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
