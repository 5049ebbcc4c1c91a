"""The group of processes that train together, and everything they say to each other.

A `World` is made once and passed in. Its methods are the program's collectives. Alone (size 1) every
collective is the identity and there is nothing to speak through.
"""

import contextlib
import math
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ..common.placement import Placement
from ..errors import WorkerLost, described
from .heartbeat import RankStatus
from .membership import Peer
from .process_group import TorchProcessGroup, backend_for, means_lost_peer
from .rendezvous import RENDEZVOUS_SECONDS, Rendezvous, reason_of
from .socket_collectives import SocketCollectives, open_listener
from .watchdog import Watchdog

T = TypeVar("T")


class Collectives(Protocol):
    """What a group communicates through: `SocketCollectives` or `TorchProcessGroup`. See `World`."""

    def all_gather(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def all_to_all(self, rows: Tensor) -> Tensor: ...  # noqa: D102
    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None: ...  # noqa: D102
    def broadcast_(self, tensor: Tensor, src: int) -> Tensor: ...  # noqa: D102
    def all_reduce_sum_(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def all_reduce_max_(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class World:
    """One process's view of its group: who it is, its device, and the collectives.

    Attributes: `rank`, `size`, `local_rank`, `local_size`, `device`, `backend` ("sockets" on CPU, else
    torch's name; "none" alone), `launcher`, `restarts` (as it counts them), `peers` (who they are),
    `status` (what this rank tells about itself), `communication_seconds` (spent in collectives so far).
    Collectives must be called by all ranks in the same order. A peer that dies makes them raise
    `WorkerLost`; one that does not go on ends this process, see `watch`.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        backend: str,
        *,
        meeting: Rendezvous | None = None,
        status: RankStatus | None = None,
    ) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self.launcher, self.restarts = placement.launcher, placement.restarts
        self.device, self.backend = device, backend
        self.peers = meeting.peers if meeting else [Peer.here(placement)]
        self.status = status or RankStatus(math.inf)
        self.communication_seconds = 0.0
        self._placement, self._meeting = placement, meeting
        self._watch: Watchdog | None = None
        self._through: Collectives | None = None
        self._process_group: TorchProcessGroup | None = None
        self._torchs = backend  # of torch's process group

    @classmethod
    def connect(
        cls,
        placement: Placement,
        *,
        backend: str | None = None,
        device: torch.device,
        listener: socket.socket | None = None,
        hang_after: float = 60.0,
    ) -> Self:
        """Meet the other ranks and return the group.

        `backend` is torch's name for one, for its process group, where it shall not be the device's usual.
        `listener` is a bound
        and listening socket for rank 0's store, where a launcher of ours holds one. `hang_after`, in
        seconds and the same on all ranks, is how long the group may stand still. Raises `LaunchError` if
        the others cannot be met.
        """
        if placement.size == 1:
            return cls(placement, device, "none")
        backend = backend or backend_for(device)
        door = open_listener() if device.type == "cpu" else None
        meeting = Rendezvous(placement, listener, door.getsockname()[1] if door else 0, hang_after)
        status = RankStatus(hang_after)
        world = cls(placement, device, "sockets" if door else backend, meeting=meeting, status=status)
        world._torchs = backend
        world._watch = Watchdog(
            placement,
            meeting.peers,
            status,
            meeting.signs,
            limit=hang_after,
            where=meeting.where,
            asynchronous=door is None,
        )
        status.enter("meeting", patience=RENDEZVOUS_SECONDS)
        world._watch.start()
        if door:
            world._through = SocketCollectives(
                placement.rank, meeting.peers, door, placement.host, meeting.word
            )
        else:
            world._through = world.join_process_group()
        world.barrier()  # or a rank that fails at once would break the others' connecting
        return world

    def join_process_group(self) -> TorchProcessGroup:
        """torch's process group, which DistributedDataParallel needs; made once, by all ranks together."""
        if self._process_group is None:
            assert self._meeting is not None
            with self.communicating("a first meeting"):
                self._process_group = TorchProcessGroup(
                    self._placement, self._meeting, self._torchs, self.device
                )
        return self._process_group

    def close(self) -> None:
        """Leave the group, all at once. Call it when nothing is under way."""
        if self.size > 1:
            self.barrier()  # a launcher may end those that are left when the first has gone
            self.leave()

    def leave(self) -> None:
        """Leave it without waiting for the others, who may be gone, or be waiting for this rank."""
        if self._watch is not None:
            self._watch.stop()
        for group in {self._through, self._process_group} - {None}:
            group.close()

    def address(self, rank: int) -> str:
        """Of a rank's host, as the others connect to it."""
        return self.peers[rank].address or self._placement.host

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Add the ranks' tensors up, in place, on every rank.

        The order of additions is the backend's. Integers are exact; so are floats of which, in each
        place, at most one rank's is not zero. That is how the program keeps its sums exact.
        """
        if self._through:
            with self.communicating("a sum"):
                self._through.all_reduce_sum_(tensor)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' values in each place, in place, on every rank."""
        if self._through:
            with self.communicating("a maximum"):
                self._through.all_reduce_max_(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, stacked by rank: `(...)` to `(size, ...)` on every rank."""
        if not self._through:
            return tensor.unsqueeze(0)
        with self.communicating("a gather"):
            return self._through.all_gather(tensor)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Row `j` goes to rank `j`; row `i` of the answer came from rank `i`. `(size, ...)` both ways."""
        if not self._through:
            return tensor
        with self.communicating("an exchange"):
            return self._through.all_to_all(tensor)

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Send contiguous tensors to some ranks and receive from some, all at once; by rank."""
        if self._through:
            with self.communicating("a swap"):
                self._through.send_recv(sent, received)

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s values, in place, on every rank."""
        if self._through:
            with self.communicating("a broadcast"):
                self._through.broadcast_(tensor, src)
        return tensor

    def broadcast_bytes(self, data: bytes | None, src: int = 0) -> bytes:
        """Rank `src`'s bytes on every rank; what the others pass is ignored."""
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

    def broadcast_object(self, value: Any, src: int) -> Any:
        """Rank `src`'s value on every rank, by pickle: it comes from a process of our own group."""
        return pickle.loads(self.broadcast_bytes(pickle.dumps(value), src))

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """Call `make` on every rank and return this rank's result; if it fails on any rank, all raise.

        The rank that failed raises its own error, the others the first failed rank's with its number, so
        all stop for the same reason instead of waiting for one that left.
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
                # Collective, so also for those who have an error of their own to raise.
                kind, text = self.broadcast_object(described(failure), src=failed[0])
                where = f"rank {failed[0]}: " if failed[0] else ""  # rank 0 is who tells it
                failure = failure or kind(f"{where}{text}")
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def on_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its (picklable) result on every rank, or its failure."""
        value = self.on_every_rank(lambda: make() if self.rank == 0 else None)
        return value if self.size == 1 else self.broadcast_object(value, src=0)  # type: ignore[return-value]

    def differing(self, sha256: str) -> list[int]:
        """The ranks that call this with another digest than rank 0."""
        mine = torch.frombuffer(bytearray.fromhex(sha256), dtype=torch.uint8).to(self.device)
        everyone = self.all_gather(mine)
        return (everyone != everyone[0]).any(dim=1).nonzero().flatten().tolist()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        here = self.all_reduce_sum_(torch.zeros(1, device=self.device))
        here.item()  # on a device that works by itself a sum returns before it is done

    @contextlib.contextmanager
    def communicating(self, what: str, *, only: bool = True) -> Iterator[None]:
        """Around whatever waits for other ranks: a backend's complaint of a lost one is `WorkerLost`.

        `what` is in the middle of a sentence: "a sum". `only` is false where that is not all that
        happens inside, so that its time is not all exchange.
        """
        self.status.wait(what)
        began = time.perf_counter()
        try:
            yield
        except WorkerLost as error:
            if not only:  # it was told where it happened
                raise
            raise WorkerLost(f"{error}, in {what}") from error
        except RuntimeError as error:
            if not means_lost_peer(error):
                raise
            raise WorkerLost(f"lost another process, in {what} ({reason_of(error)})") from error
        finally:
            self.communication_seconds += only * (time.perf_counter() - began)
            self.status.wait(None)
