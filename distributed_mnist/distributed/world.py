"""The process group: its ranks, its device and its collectives.

A `World` is created once and passed to the code that needs it. With one process (size 1) every collective
returns its input, and there are no connections.
"""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self, TypeVar

import torch
from torch import Tensor

from ..common.messages import decode, encode
from ..common.placement import Placement
from ..errors import WorkerLost, described, recreate
from .agent_store import reason_of
from .heartbeat import RankStatus
from .peer import JobDescription, Peer
from .process_group import DeviceClock, TorchProcessGroup, choose_backend, means_lost_peer
from .rendezvous import RENDEZVOUS_SECONDS, Rendezvous
from .socket_collectives import Collectives, SocketCollectives, StagedCollectives
from .watchdog import Watchdog

T = TypeVar("T")


class World:
    """One process's view of its group: its rank, its device, and the collectives.

    Attributes: `rank`, `size`, `local_rank`, `local_size`, `device`, `backend` (of collectives, or "none"
    for one process), `asynchronous` (whether a collective may return before it is finished), `launcher`,
    `restarts` (the launcher's count), `peers` (all ranks, in order), `status` (the `RankStatus` of this
    rank, from which its heartbeats are made), `communication_seconds` (time spent in collectives so far, by
    the CPU's clock), `device_clock`.

    All ranks must call the collectives in the same order. When a peer dies, they raise `WorkerLost`. When a
    peer hangs, the watchdog ends this process.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        backend: str,
        *,
        rendezvous: Rendezvous | None = None,
        status: RankStatus | None = None,
    ) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self.launcher, self.restarts = placement.launcher, placement.restarts
        self.device, self.backend = device, backend
        self.asynchronous = device.type != "cpu" and backend != "sockets"
        self.peers = rendezvous.peers if rendezvous else [Peer.here(placement, device=device.type)]
        self.status = status or RankStatus(math.inf)
        self.communication_seconds = 0.0
        self.device_clock = DeviceClock(device if self.asynchronous else None)
        self._placement, self._rendezvous = placement, rendezvous
        self._watchdog: Watchdog | None = None
        self._sockets: SocketCollectives | None = None
        self._collectives: Collectives | None = None
        self._process_group: TorchProcessGroup | None = None
        self._torch_backend = backend  # of torch's process group

    @classmethod
    def connect(
        cls,
        placement: Placement,
        *,
        backend: str | None = None,
        device: torch.device,
        listener: socket.socket | None = None,
        hang_after: float = 60.0,
        job: JobDescription | None = None,
        shared: bool = False,
    ) -> Self:
        """Connect to the other ranks and return the group.

        The ranks may be on different kinds of device. `backend` is that of torch's process group; the
        default depends on the devices. `listener` is a bound and listening socket for rank 0, if our own
        launcher opened one. `hang_after`, the same on all ranks, is how many seconds the group may go
        without progress. `job` describes what all ranks must have in common. `shared`, the same on all
        ranks, is whether several may be on one device. Raises `LaunchError` if the other ranks cannot be
        reached, and `UsageError` if rank 0 belongs to another job.
        """
        if placement.size == 1:
            return cls(placement, device, "none")
        rendezvous = Rendezvous(placement, listener, hang_after, job or {}, device=device.type)
        try:
            name = choose_backend([peer.device for peer in rendezvous.peers], backend, shared=shared)
        except BaseException:
            rendezvous.close()
            raise
        status = RankStatus(hang_after)
        world = cls(placement, device, name, rendezvous=rendezvous, status=status)
        world._torch_backend = backend or ("gloo" if name == "sockets" else name)
        world._watchdog = Watchdog(
            placement,
            rendezvous.peers,
            status,
            rendezvous.exchange,
            limit=hang_after,
            where=rendezvous.where,
            asynchronous=world.asynchronous,
        )
        status.enter("rendezvous", patience=RENDEZVOUS_SECONDS)
        world._watchdog.start()
        world._sockets = SocketCollectives(placement.rank, rendezvous)
        try:
            if name != "sockets":
                world._collectives = world.join_process_group()
            else:
                on_cpu = device.type == "cpu"
                world._collectives = world._sockets if on_cpu else StagedCollectives(world._sockets)
            world.barrier()  # without it, a rank that fails at once would break the others' connections
        except BaseException:  # the process may go on without a group
            world.leave()
            raise
        return world

    def join_process_group(self) -> TorchProcessGroup:
        """Return torch's process group, which DistributedDataParallel needs.

        The first call creates it; all ranks make that call together.
        """
        if self._process_group is None:
            assert self._rendezvous is not None
            assert self._sockets is not None
            with self.communicating("the process group setup"):
                self._process_group = TorchProcessGroup(
                    self._placement, self._rendezvous, self._sockets, self._torch_backend, self.device
                )
        return self._process_group

    def close(self) -> None:
        """Leave the group, together with all other ranks. No collective may be in progress."""
        if self.size > 1:
            self.barrier()  # a launcher may end the remaining processes when the first one exits
            self.leave()

    def leave(self) -> None:
        """Leave the group without waiting for the other ranks, which may be dead or may wait for us."""
        if self._watchdog is not None:
            self._watchdog.stop()
        for part in (self._process_group, self._sockets, self._rendezvous):
            if part is not None:
                part.close()

    def address(self, rank: int) -> str:
        """Return the address at which the other ranks reach a rank's host."""
        return self.peers[rank].address or self._placement.host

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum the ranks' tensors, in place, on every rank.

        The backend chooses the order of the additions. Sums of integers are exact. Sums of floats are exact
        if each element is nonzero on at most one rank; this is how the program keeps its sums exact.
        """
        if self._collectives:
            with self.communicating("an all-reduce"):
                self._collectives.all_reduce_sum_(tensor)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum of each element over all ranks, in place, on every rank."""
        if self._collectives:
            with self.communicating("an all-reduce"):
                self._collectives.all_reduce_max_(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack all ranks' tensors by rank: `(...)` to `(size, ...)`, on every rank."""
        if not self._collectives:
            return tensor.unsqueeze(0)
        with self.communicating("an all-gather"):
            return self._collectives.all_gather(tensor)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Send row `j` to rank `j`; row `i` of the result is from rank `i`. Both are `(size, ...)`."""
        if not self._collectives:
            return tensor
        with self.communicating("an all-to-all"):
            return self._collectives.all_to_all(tensor)

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Send to some ranks and receive from some at the same time. Maps ranks to contiguous tensors."""
        if self._collectives:
            with self.communicating("a send-receive"):
                self._collectives.send_recv(sent, received)

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Copy rank `src`'s values into every rank's tensor."""
        if self._collectives:
            with self.communicating("a broadcast"):
                self._collectives.broadcast_(tensor, src)
        return tensor

    def broadcast_bytes(self, data: bytes | None, src: int = 0) -> bytes:
        """Return rank `src`'s bytes on every rank. The other ranks' `data` is ignored."""
        if self.size == 1:
            return data or b""
        own = data if self.rank == src and data else b""
        length = self.broadcast_(torch.tensor([len(own)], device=self.device), src)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if own:
            buffer.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        if len(buffer):
            self.broadcast_(buffer, src)
        return buffer.cpu().numpy().tobytes()

    def broadcast_object(self, value: T | None, expected: type[T], src: int) -> T:
        """Return rank `src`'s value on every rank; the other ranks' `value` is ignored.

        `expected` is its type, see `messages.encode`.
        """
        return decode(self.broadcast_bytes(encode(value) if self.rank == src else None, src), expected)

    def all_gather_object(self, value: T, expected: type[T]) -> list[T]:
        """Return the values of all ranks, by rank. `expected` is their type, see `messages.encode`."""
        return [self.broadcast_object(value, expected, src) for src in range(self.size)]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank and return this rank's result. If it fails on one rank, all raise.

        A rank on which it failed raises its own error. The other ranks raise the error of the lowest failed
        rank, with its number. So all ranks stop, and none waits for a rank that has left.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = make()
        except Exception as error:
            failure = error
        if self.size > 1:
            mine = torch.tensor([int(failure is not None)], device=self.device)
            failed = self.all_gather(mine).flatten().nonzero().flatten().tolist()
            if failed:
                # This is a collective, so ranks with their own error must call it too.
                name, text = self.broadcast_object(described(failure), tuple[str, str], src=failed[0])
                where = f"rank {failed[0]}: " if failed[0] else ""  # rank 0 prints the error
                failure = failure or recreate(name, f"{where}{text}")
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def on_rank_zero(self, make: Callable[[], T], expected: type[T]) -> T:
        """Call `make` on rank 0 only. Every rank returns its result, of the type `expected`, or raises its
        error.
        """
        value = self.on_every_rank(lambda: make() if self.rank == 0 else None)
        return value if self.size == 1 else self.broadcast_object(value, expected, 0)  # type: ignore[return-value]

    def differing(self, sha256: str) -> list[int]:
        """Return the ranks whose digest (hexadecimal SHA-256) differs from rank 0's."""
        mine = torch.frombuffer(bytearray.fromhex(sha256), dtype=torch.uint8).to(self.device)
        everyone = self.all_gather(mine)
        return (everyone != everyone[0]).any(dim=1).nonzero().flatten().tolist()

    def barrier(self) -> None:
        """Return when every rank has called this."""
        total = self.all_reduce_sum_(torch.zeros(1, device=self.device))
        total.item()  # on an asynchronous device an all-reduce returns before it is finished

    def finish_queued_work(self) -> None:
        """Wait until the device has computed what it was given. A CPU computes at once."""
        if self.asynchronous:  # then a collective may be among it
            with self.communicating("a step", also_computes=True):
                torch.accelerator.synchronize()
        elif self.device.type != "cpu":
            torch.accelerator.synchronize()

    @contextlib.contextmanager
    def communicating(self, collective: str, *, also_computes: bool = False) -> Iterator[None]:
        """Wrap code that waits for other ranks. A backend's error about a lost peer becomes `WorkerLost`.

        `collective` is a noun for messages, such as "an all-reduce". With `also_computes`, the time does
        not count as communication, and a `WorkerLost` from a collective in the code passes unchanged.
        """
        if not self.asynchronous:
            self.finish_queued_work()  # before this rank waits for others, and not as a part of it
        self.status.set_waiting(collective)
        began, mark = time.perf_counter(), None if also_computes else self.device_clock.mark()
        try:
            yield
            self.device_clock.add(mark)
        except WorkerLost as error:
            if also_computes:  # the message already names the collective inside
                raise
            raise WorkerLost(f"{error}, in {collective}") from error
        except RuntimeError as error:
            if not means_lost_peer(error):
                raise
            raise WorkerLost(f"lost another process, in {collective} ({reason_of(error)})") from error
        finally:
            self.communication_seconds += (not also_computes) * (time.perf_counter() - began)
            self.status.set_waiting(None)
