"""The group of processes that train together, and everything they say to each other.

A `World` is made once and passed in. Its methods are the program's collectives: nothing else touches
`torch.distributed`. Alone (size 1) every collective is the identity and no process group exists.
"""

import contextlib
import math
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import environment, rendezvous
from .errors import Hang, LaunchError, WorkerLost, described
from .placement import Placement
from .roll_call import Peer, RollCall, meet
from .vitals import Vitals
from .watch import Watch

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)  # the backend's, which names nobody: the group's watch is there long before
_LOST = re.compile(r"gloo/transport|[Cc]onnection|\bpeer\b|NCCL|[Tt]imed? ?out|\b[Ss]tore\b", re.ASCII)
MEETING_SECONDS = 300.0  # hosts of one job can be minutes apart in starting
STORE_SECONDS = 30.0  # a store that the launcher keeps is there before we are
_STALE = "; if that host is gone, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"


class World:
    """One process's view of its group: who it is, its device, and the collectives.

    Attributes: `rank`, `size`, `local_rank`, `local_size`, `device`, `backend` ("gloo", "nccl", "xccl" or
    "none"), `launcher`, `restarts` (as it counts them), `peers` (who they are), `vitals` (what this rank
    tells about itself). Collectives must be called by all ranks in the same order. A peer that dies makes
    them raise `WorkerLost`; one that does not go on ends this process, see `watch`.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        backend: str,
        *,
        peers: Sequence[Peer] | None = None,
        vitals: Vitals | None = None,
    ) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self.launcher, self.restarts = placement.launcher, placement.restarts
        self.device, self.backend = device, backend
        self.peers = list(peers or [Peer.here(placement)])
        self.vitals = vitals or Vitals(math.inf)
        self._watch: Watch | None = None

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

        `listener` is a bound and listening socket for rank 0's store, where a launcher of ours holds one.
        `hang_after`, in seconds and the same on all ranks, is how long the group may stand still.
        Raises `LaunchError` if the others cannot be met.
        """
        if placement.size == 1:
            return cls(placement, device, "none")
        backend = backend or _backend_for(device)
        store = _meet(placement, listener)
        where = f"{placement.host} port {store.port}"
        jobs = dist.PrefixStore(placement.job, store)
        me = Peer.here(placement)
        try:
            call = _everyone(jobs, me, placement, where, hang_after)
            own = _store(placement, store.port, serve=False)  # another connection: this one may block
        except RuntimeError as error:
            raise WorkerLost(f"lost rank 0 while meeting at {where} ({_reason(error)})") from error
        if placement.local_size < placement.size:
            others = [peer.address for peer in call.peers if peer.address]
            if (interface := rendezvous.interface_towards([placement.host, *others])) is not None:
                environment.talk_over(interface)
        vitals = Vitals(hang_after)
        world = cls(placement, device, backend, peers=call.peers, vitals=vitals)
        world._watch = Watch(
            placement,
            call.peers,
            vitals,
            dist.PrefixStore(call.attempt, dist.PrefixStore(placement.job, own)),
            limit=hang_after,
            where=where,
            asynchronous=device.type != "cpu",
        )
        vitals.enter("meeting", patience=MEETING_SECONDS)
        world._watch.start()
        try:
            with world.speaking("first meeting"):
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore(call.attempt, jobs),
                    rank=placement.rank,
                    world_size=placement.size,
                    timeout=TIMEOUT,
                    device_id=device if device.type != "cpu" else None,
                )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot join the group: {_reason(error)}") from error
        world.barrier()  # or a rank that fails at once would break the others' connecting
        return world

    def close(self) -> None:
        """Leave the group, all at once. Call it when nothing is under way."""
        if self.size > 1:
            self.barrier()  # a launcher may end those that are left when the first has gone
            if self._watch is not None:
                self._watch.stop()
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the ranks' tensors up, in place, on every rank.

        The order of additions is the backend's. Integers are exact; so are floats of which, in each
        place, at most one rank's is not zero. That is how the program keeps its sums exact.
        """
        if self.size > 1:
            with self.speaking("sum"):
                dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' values in each place, in place, on every rank."""
        if self.size > 1:
            with self.speaking("maximum"):
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, stacked by rank: `(...)` to `(size, ...)` on every rank."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        with self.speaking("gather"):
            dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def exchange(self, tensor: Tensor) -> Tensor:
        """Row `j` goes to rank `j`; row `i` of the answer came from rank `i`. `(size, ...)` both ways."""
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor)
        with self.speaking("exchange"):
            dist.all_to_all_single(received, tensor)
        return received

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s values, in place, on every rank."""
        if self.size > 1:
            with self.speaking("broadcast"):
                dist.broadcast(tensor, src=src)
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

    def together(self, make: Callable[[], T]) -> T:
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
            failed = self.gather(mine).flatten().nonzero().flatten().tolist()
            if failed:
                # Collective, so also for those who have an error of their own to raise.
                kind, text = self.broadcast_object(described(failure), src=failed[0])
                where = f"rank {failed[0]}: " if failed[0] else ""  # rank 0 is who tells it
                failure = failure or kind(f"{where}{text}")
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its (picklable) result on every rank, or its failure."""
        value = self.together(lambda: make() if self.rank == 0 else None)
        return value if self.size == 1 else self.broadcast_object(value, src=0)  # type: ignore[return-value]

    def differing(self, sha256: str) -> list[int]:
        """The ranks that call this with another digest than rank 0."""
        mine = torch.frombuffer(bytearray.fromhex(sha256), dtype=torch.uint8).to(self.device)
        everyone = self.gather(mine)
        return (everyone != everyone[0]).any(dim=1).nonzero().flatten().tolist()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.sum_(torch.zeros(1, device=self.device))

    @contextlib.contextmanager
    def speaking(self, what: str) -> Iterator[None]:
        """Around whatever waits for other ranks: a backend's complaint of a lost one is `WorkerLost`."""
        self.vitals.wait(what)
        try:
            yield
        except RuntimeError as error:
            if not _LOST.search(str(error)):
                raise
            raise WorkerLost(f"lost another process in a {what} ({_reason(error)})") from error
        finally:
            self.vitals.wait(None)


def _backend_for(device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    if device.type == "mps":
        raise LaunchError("MPS has one device and no collectives: train with --nproc 1")
    return dist.get_default_backend_for_device(device)


def _meet(placement: Placement, listener: socket.socket | None) -> dist.TCPStore:
    """The store at which the group meets, served by the launcher or by rank 0. Raises `LaunchError`."""
    serve = placement.rank == 0 and not placement.store_exists
    derived = len(placement.ports) > 1  # else the one port was told to all
    try:
        if listener is not None and serve:
            return _store(placement, listener.getsockname()[1], serve=True, listen_fd=listener.detach())
        if not derived:
            if not serve:
                seconds, hint = (STORE_SECONDS, _STALE) if placement.store_exists else (MEETING_SECONDS, "")
                rendezvous.wait_for(placement.host, placement.ports[0], seconds, hint)
            return _store(placement, placement.ports[0], serve=serve)
        if serve:
            store = _store(placement, 0, serve=True)
            rendezvous.announce(placement.ports, placement.job, store.port)
            return store
        port = rendezvous.find(placement.host, placement.ports, placement.job, MEETING_SECONDS)
        return _store(placement, port, serve=False)
    except (RuntimeError, ValueError) as error:
        where = f"{placement.host}, port {placement.ports[0]}"
        raise LaunchError(f"cannot meet the group at {where}: {_reason(error)}") from error


def _everyone(store: dist.Store, me: Peer, placement: Placement, where: str, hang_after: float) -> RollCall:
    """The finished roll call. Processes of our own launcher come at once, and can be started again."""
    ours = placement.launcher == "spawned"
    try:
        seconds = max(hang_after, STORE_SECONDS) if ours else MEETING_SECONDS
        return meet(store, me, placement.size, where=where, seconds=seconds)
    except LaunchError as error:
        raise (Hang(str(error)) if ours else error) from None


def _store(placement: Placement, port: int, *, serve: bool, listen_fd: int | None = None) -> dist.TCPStore:
    return dist.TCPStore(
        placement.host,
        port,
        world_size=placement.size,
        is_master=serve,
        timeout=timedelta(seconds=MEETING_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _reason(error: BaseException) -> str:
    """The first sentence of a backend's message, without the place in its source that it begins with."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^\]]*\.cc:\d+\]\s*", "", first_line).split(". ")[0]
