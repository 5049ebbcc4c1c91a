"""The group of processes that train together, and everything they say to each other.

A `World` is made once and passed in. Its methods are the program's collectives: nothing else touches
`torch.distributed`. Alone (size 1) every collective is the identity and no process group exists.
"""

import contextlib
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import rendezvous
from .errors import DmnistError, LaunchError, WorkerLost
from .placement import Placement

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # rank 0 may be downloading the data while the others wait for it
_LOST = re.compile(r"gloo/transport|[Cc]onnection|peer|NCCL|[Tt]imed? ?out|store", re.ASCII)
MEETING_SECONDS = 300.0  # hosts of one job can be minutes apart in starting


class World:
    """One process's view of its group: who it is, its device, and the collectives.

    Attributes: `rank`, `size`, `local_rank`, `local_size`, `device`, `backend` ("gloo", "nccl", "xccl" or
    "none"), `launcher`. Every method but `close` must be called by all ranks in the same order. A peer
    that dies makes them raise `WorkerLost`.
    """

    def __init__(self, placement: Placement, device: torch.device, backend: str) -> None:
        self.rank, self.size = placement.rank, placement.size
        self.local_rank, self.local_size = placement.local_rank, placement.local_size
        self.launcher = placement.launcher
        self.device, self.backend = device, backend

    @classmethod
    def connect(
        cls,
        placement: Placement,
        *,
        backend: str | None = None,
        device: torch.device,
        listener: socket.socket | None = None,
    ) -> Self:
        """Meet the other ranks and return the group.

        `listener` is a bound and listening socket for rank 0's store, where a launcher of ours holds one.
        Raises `LaunchError` if the others cannot be met.
        """
        if placement.size == 1:
            return cls(placement, device, "none")
        backend = backend or _backend_for(device)
        store = dist.PrefixStore(placement.store_prefix, _meet(placement, listener))
        _wait_for_all(store, placement)
        bind = device if device.type != "cpu" else None
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=placement.rank,
                world_size=placement.size,
                timeout=TIMEOUT,
                device_id=bind,
            )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot join the group: {_reason(error)}") from error
        world = cls(placement, device, backend)
        world.barrier()  # or a rank that fails at once would break the others' connecting
        return world

    def close(self) -> None:
        """Leave the group, all at once. Call it when nothing is under way."""
        if self.size > 1:
            self.barrier()  # a launcher may end those that are left when the first has gone
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

    def _broadcast_object(self, value: Any, src: int) -> Any:
        # Pickle is safe here: it comes from a process of our own group.
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
                kind, text = self._broadcast_object(_described(failure), src=failed[0])
                where = f"rank {failed[0]}: " if failed[0] else ""  # rank 0 is who tells it
                failure = failure or kind(f"{where}{text}")
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its (picklable) result on every rank, or its failure."""
        value = self.together(lambda: make() if self.rank == 0 else None)
        return value if self.size == 1 else self._broadcast_object(value, src=0)  # type: ignore[return-value]

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
        """Around whatever talks to other ranks: a backend's complaint of a lost one is `WorkerLost`."""
        try:
            yield
        except RuntimeError as error:
            if not _LOST.search(str(error)):
                raise
            raise WorkerLost(f"lost another process in a {what} ({_reason(error)})") from error


def choose_device(placement: Placement) -> torch.device:
    """This rank's accelerator if the host has one for each of its ranks, the CPU if it has none.

    Raises `LaunchError` for more processes than devices: two ranks on one GPU would be slower than one,
    and NCCL refuses them with a less helpful message.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    index = 0 if placement.own_device and count == 1 else placement.local_rank
    if index >= count or (placement.local_size > count and not placement.own_device):
        error = LaunchError(
            f"{placement.local_size} processes on this host but {count} {kind.type.upper()} device"
            f"{'s' if count > 1 else ''}: start at most {count}"
        )
        error.on_one_rank = False  # the others find the same
        raise error
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def _backend_for(device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    if device.type == "mps":
        raise LaunchError("MPS has one device and no collectives: train with --nproc 1")
    return dist.get_default_backend_for_device(device)


def _meet(placement: Placement, listener: socket.socket | None) -> dist.Store:
    """The store at which the group meets, served by the launcher or by rank 0. Raises `LaunchError`."""
    serve = placement.rank == 0 and not placement.store_exists
    derived = len(placement.ports) > 1  # else the one port was told to all
    try:
        if listener is not None and serve:
            return _store(placement, listener.getsockname()[1], serve=True, listen_fd=listener.detach())
        if not derived:
            if not serve:
                rendezvous.wait_for(placement.host, placement.ports[0], MEETING_SECONDS)
            return _store(placement, placement.ports[0], serve=serve)
        if serve:
            store = _store(placement, 0, serve=True)
            rendezvous.announce(placement.ports, placement.store_prefix, store.port)
            return store
        port = rendezvous.find(placement.host, placement.ports, placement.store_prefix, MEETING_SECONDS)
        return _store(placement, port, serve=False)
    except (RuntimeError, ValueError) as error:
        where = f"{placement.host}, port {placement.ports[0]}"
        raise LaunchError(f"cannot meet the group at {where}: {_reason(error)}") from error


def _wait_for_all(store: dist.Store, placement: Placement) -> None:
    """Return when every rank has come to the store. Raises `LaunchError` naming those that have not.

    The backend would wait as well, but inside of C++, where no signal is heard, and would name nobody.
    """
    store.set(f"here/{placement.rank}", "")
    missing = [f"here/{rank}" for rank in range(placement.size)]
    deadline = time.monotonic() + MEETING_SECONDS
    while not store.check(missing):
        if time.monotonic() > deadline:
            absent = ", ".join(key.partition("/")[2] for key in missing if not store.check([key]))
            raise LaunchError(
                f"still missing at {placement.host} after {MEETING_SECONDS:.0f} s: rank {absent}"
            )
        time.sleep(0.01)


def _described(error: Exception | None) -> tuple[type[DmnistError], str]:
    """An error as another rank can raise it: its text, and its class where that takes just a text."""
    if isinstance(error, DmnistError):
        return type(error), str(error)
    return DmnistError, f"{type(error).__name__}: {error}"


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
    return re.sub(r"\[[^\]]*\.cc:\d+\]\s*", "", _first_line(error)).split(". ")[0]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
