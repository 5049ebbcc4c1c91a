"""Connect the ranks of a group: find rank 0, and wait there until all ranks are present."""

import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..common.placement import Placement, is_loopback
from ..errors import (
    DmnistError,
    Hang,
    LaunchError,
    UsageError,
    WorkerLost,
    described,
    print_note,
    reason,
    recreate,
)
from . import network
from .authentication import NotOurs
from .coordinator import Coordinator, CoordinatorConnection, Membership, TurnedAway
from .heartbeat import Heartbeat
from .job_key import NO_SECRET, job_key
from .listener import Listener
from .peer import JobDescription, Peer

if TYPE_CHECKING:
    from .agent_store import AgentStore

RENDEZVOUS_SECONDS = 300.0  # the hosts of one job can start minutes apart
_SPAWNED_SECONDS = 30.0  # our own launcher starts all processes at once, and can restart them
_SILENT_SECONDS = 10.0  # until a rank says for whom it waits, and then again
_FAREWELL_SECONDS = 20.0
"""How long a rank that cannot take part waits for the others, to tell them. They may start later."""
_MOST_SHOWN = 8  # ranks in a message
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0  # for rank 0 to answer, on a connection that works
_DERIVED_SECONDS = 1.0  # for one of several ports, which may be another program's


class Rendezvous:
    """The result of a rendezvous: all ranks are present and know each other.

    `sock` is a bound and listening socket for rank 0, if our own launcher opened one. `hang_after` is how
    many seconds processes from our own launcher wait for each other. `job` describes what all ranks must
    have in common; `device` is the kind on which this one computes, which may differ. `failure` is why this
    rank cannot take part, see `tell_failure`. Raises `LaunchError` if the other ranks cannot be reached,
    `UsageError` if rank 0 belongs to another job, and the error of a rank that cannot take part.

    Attributes: `peers`; `attempt`, a random name that only the ranks of this attempt know; `key`, with
    which they prove that they belong to the job; `host`, the address of rank 0's host; `where`, rank 0's
    address and port for messages; `listener`, this rank's; `exchange(heartbeat)`, which returns the latest
    heartbeat of each rank.
    """

    def __init__(
        self,
        placement: Placement,
        sock: socket.socket | None,
        hang_after: float,
        job: JobDescription,
        failure: tuple[str, str] | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self._placement, self._size, self._job = placement, placement.size, job
        self._device = device
        self._spawned = placement.launcher == "spawned"
        self._seconds = max(hang_after, _SPAWNED_SECONDS) if self._spawned else RENDEZVOUS_SECONDS
        self._began, self._silent_until = time.monotonic(), _SILENT_SECONDS
        self._failure = failure
        if failure:
            self._seconds, self._silent_until = _FAREWELL_SECONDS, math.inf
        self.host = network.LOOPBACK if placement.one_host else placement.host
        self.key, is_secret = job_key(placement)
        if not is_secret and placement.rank == 0 and not failure:
            print_note(NO_SECRET, placement)
        self._agent_store = _agent_store(placement) if placement.store_exists else None
        self._ports = network.derived_ports(placement.job) if placement.store_exists else placement.ports
        self._connection: CoordinatorConnection | None = None
        self.listener: Listener | None = None
        try:
            membership = self._serve(sock) if placement.rank == 0 else self._join()
        except BaseException:  # the process may go on without a group
            self.close()
            raise
        self.peers, self.attempt = membership.peers, membership.attempt

    def close(self) -> None:
        """Close this rank's connections."""
        if self._connection is not None:
            self._connection.close()
        if self.listener is not None:
            self.listener.close()

    def accept(self, rank: int) -> socket.socket:
        """Return the connection that a rank of this attempt has opened to this rank; wait for it."""
        assert self.listener is not None
        return self.listener.accept(self.attempt, rank)

    def _serve(self, sock: socket.socket | None) -> Membership:
        """Be the coordinator, and wait until all ranks are present."""
        report = partial(print_note, placement=self._placement)
        coordinator = Coordinator(self._size, self._job, report)
        one_host = self._placement.one_host
        if one_host and self._size > 1:
            network.require_loopback()
        sock = sock or self._open(network.LOOPBACK if one_host else "", self._ports)
        me = self._listen(sock, "" if one_host else network.address_towards(self.host), coordinator)
        self.where = f"{self.host} port {me.port}"
        self.exchange: Callable[[Heartbeat], Mapping[int, Heartbeat]] = partial(coordinator.exchange, 0)
        published = -math.inf
        if not one_host and not self._failure:
            elsewhere = "" if network.is_here(self.host) else ", which is no address of this host"
            who = f"{self._placement.launcher}: rank 0 of {self._size} (pid {me.pid} on {me.host})"
            report(f"{who} waits for the others at {self.where}{elsewhere}")
        refused: TurnedAway | None = None
        until = math.inf  # when this rank stops telling the others
        while True:
            try:
                if self._failure and refused is None:
                    coordinator.fail(me, self._failure)
                membership = coordinator.join(me, self._job)
                if not membership.missing:
                    return membership
                self._check_time(membership.missing)
            except TurnedAway as error:  # a rank cannot take part: the others must know
                if refused is None:
                    refused, until = error, time.monotonic() + _FAREWELL_SECONDS
                if coordinator.everyone_knows() or time.monotonic() > until:
                    raise self._final(refused) from None
            if self._agent_store is not None and time.monotonic() > published + 1:
                self._agent_store.publish(me.address, me.port)  # again, because others may overwrite it
                published = time.monotonic()
            time.sleep(0.005)

    def _join(self) -> Membership:
        """Find rank 0, and ask it again and again until all ranks are present."""
        me: Peer | None = None
        self.where = f"{self.host} port {', '.join(map(str, self._ports))}"
        pause = max(0.005, self._size / 2000)  # rank 0 answers 2,000 requests a second
        missing, problem, refusal = [0], "", ""
        while True:
            left = self._check_time(missing, problem)
            try:
                if self._connection is None:
                    self._connection = self._connect(left)
                    self.where = self._connection.where
                if me is None:
                    address = self._connection.local_address
                    if is_loopback(address) and not self._placement.one_host:
                        address = ""  # it is on rank 0's host, and the others are not
                    me = self._listen(self._open(address), address)
                seconds = min(left, _ANSWER_SECONDS)
                membership = self._connection.join(me, self._job, self._failure, seconds=seconds)
                if not membership.missing:
                    self.exchange = self._connection.exchange
                    return membership
                missing, problem = membership.missing, ""
            except (OSError, ValueError) as error:
                if isinstance(error, TurnedAway) and error.final:
                    raise self._final(error) from None
                if isinstance(error, NotOurs):  # which says more than that rank 0 has left since
                    refusal = f" ({_why(error)})"
                missing, problem = [0], refusal or f" ({_why(error)})"
                if self._connection is not None:
                    self._connection.close()
                    if self._spawned and not isinstance(error, TimeoutError):
                        raise WorkerLost(f"lost rank 0 during the rendezvous{problem}") from error
                    self._connection = None
            time.sleep(pause if self._connection else max(pause, 0.02))

    def _check_time(self, missing: Sequence[int], problem: str = "") -> float:
        """Return the seconds left, and say now and then which ranks are missing.

        Raises `LaunchError` once no time is left, or `Hang` under our own launcher, which can restart the
        group.
        """
        waited = time.monotonic() - self._began
        more = f" and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
        ranks = f"rank {', '.join(map(str, missing[:_MOST_SHOWN]))}{more}{problem}"
        if waited > self._seconds:
            message = f"still missing at {self.where} after {waited:.0f} s: {ranks}"
            raise Hang(message) if self._spawned else LaunchError(message)
        if waited > self._silent_until:
            self._silent_until = waited + _SILENT_SECONDS
            # Rank 0 says which ranks it waits for, and one rank of each host that it waits for rank 0.
            if self._placement.rank == 0 or (missing == [0] and self._placement.local_rank == 0):
                so_far = f"{self._placement.launcher}, {self._size} processes, {waited:.0f} s so far"
                print_note(f"waiting at {self.where} for {ranks}; {so_far}", self._placement)
        return self._seconds - waited

    def _final(self, error: TurnedAway) -> DmnistError:
        if error.failure:
            failed = recreate(*error.failure)
            failed.on_one_rank = False  # rank 0 says it for all
            return failed
        refused = UsageError(
            f"{error}; start all ranks of a job with the same flags, and give each job its own port "
            f"(rank 0 is at {self.where})"
        )
        refused.on_one_rank = True
        return refused

    def _connect(self, seconds: float) -> CoordinatorConnection:
        """Connect to rank 0. Raises `OSError`."""
        places = [(self.host, port) for port in self._ports]
        if self._agent_store is not None:
            address, port = self._agent_store.rank_zero()
            # If the store names a stranger, rank 0 may still be where the store is, as it usually is.
            places.insert(0, (network.LOOPBACK if self._placement.one_host else address or self.host, port))
        limit = _CONNECT_SECONDS if len(places) == 1 else _DERIVED_SECONDS
        problem: OSError = ConnectionError("it has no port")
        for host, port in places:
            try:
                return CoordinatorConnection(
                    host, port, self.key, self._placement.rank, seconds=min(seconds, limit)
                )
            except OSError as error:
                if not isinstance(problem, NotOurs):  # which says more
                    problem = error
        raise problem

    def _open(self, address: str, ports: Sequence[int] = (0,)) -> socket.socket:
        """Listen on the first free port. Raises `LaunchError`."""
        problem = ""
        for port in ports:
            try:
                return network.open_listener(address, port)
            except OSError as error:
                problem = os.strerror(error.errno or 0).lower()  # the error's own text repeats the address
                if error.errno == errno.EADDRINUSE:
                    problem += ": another job or program listens there; choose another MASTER_PORT"
        raise LaunchError(f"cannot listen on port {', '.join(map(str, ports))} of this host: {problem}")

    def _listen(self, sock: socket.socket, address: str, coordinator: Coordinator | None = None) -> Peer:
        """Let the other ranks connect to this one. Return its description for them."""
        report = partial(print_note, placement=self._placement)
        serve = coordinator.serve if coordinator else None
        self.listener = Listener(sock, self.key, coordinate=serve, report=report)
        known = "" if is_loopback(address) else address  # a rank on rank 0's host is reached as rank 0 is
        return Peer.here(self._placement, known, self.listener.port, device=self._device)


def tell_failure(placement: Placement, error: Exception) -> None:
    """Tell the other ranks why this one cannot take part, before it joins: they would wait for it.

    They end with the same error. This takes at most `_FAREWELL_SECONDS`. It is not needed where the
    launcher ends all ranks if one fails: ours, and torchrun on one host.
    """
    if placement.size == 1 or placement.launcher == "spawned" or (placement.parent and placement.one_host):
        return
    with contextlib.suppress(DmnistError, OSError):
        Rendezvous(placement, None, 0.0, {}, described(error))


def _agent_store(placement: Placement) -> "AgentStore":
    from .agent_store import AgentStore  # noqa: PLC0415 - it imports torch

    return AgentStore(placement)


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, socket.gaierror):
        return f"this host does not know the name: {reason(error)}"
    if isinstance(error, OSError) and not isinstance(error, NotOurs):
        return reason(error)
    return str(error)
