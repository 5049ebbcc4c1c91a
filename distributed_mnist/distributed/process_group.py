"""Collectives through torch's process group, for devices other than the CPU.

DistributedDataParallel needs the process group on every device.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import environment
from ..common.placement import Placement
from ..errors import LaunchError
from . import network
from .agent_store import reason_of
from .rendezvous import Rendezvous
from .socket_collectives import SocketCollectives

_TIMEOUT = timedelta(hours=1)  # of the backend, which names no rank; the watchdog acts much earlier
_STORE_TIMEOUT = timedelta(minutes=5)
_LOST = re.compile(r"gloo/transport|[Cc]onnection|\bpeer\b|NCCL|[Tt]imed? ?out|\b[Ss]tore\b", re.ASCII)


class TorchProcessGroup:
    """The same collectives as `SocketCollectives`, through torch.

    All ranks create it together, over `sockets`. Raises `LaunchError` if the process group cannot be
    initialized. Its store and its backend do not ask who connects (docs/explanation/security.md).
    """

    def __init__(
        self,
        placement: Placement,
        rendezvous: Rendezvous,
        sockets: SocketCollectives,
        backend: str,
        device: torch.device,
    ) -> None:
        self._size = placement.size
        addresses = [peer.address for peer in rendezvous.peers]
        mine = (
            [network.LOOPBACK]
            if placement.one_host
            else [addresses[placement.rank], *map(network.address_towards, addresses)]
        )
        if (interface := network.interface_of(mine)) is not None:
            environment.use_interface(interface)
        try:
            dist.init_process_group(
                backend,
                store=_store(placement, rendezvous, sockets),
                rank=placement.rank,
                world_size=placement.size,
                timeout=_TIMEOUT,
                device_id=device if device.type != "cpu" and backend != "gloo" else None,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot join the process group: {reason_of(error)}") from error

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack all ranks' tensors by rank: `(...)` to `(size, ...)`."""
        gathered = tensor.new_empty((self._size, *tensor.shape))
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row `j` to rank `j`; row `i` of the result is from rank `i`."""
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows)
        return received

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Send to some ranks and receive from some at the same time."""
        calls = [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in received.items()]
        calls += [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in sent.items()]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Copy rank `src`'s values into every rank's tensor."""
        dist.broadcast(tensor, src=src)
        return tensor

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum in place, in an order that the backend chooses."""
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum of each element, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


class DeviceClock:
    """Times collectives on a device that works asynchronously, with events on its stream.

    The CPU only starts such a collective. It lasts from when the device has finished all work before it.
    `device` is None if collectives are finished when they return, so that the CPU's clock is right.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._spans: list[tuple[Any, Any]] | None = None

    def start(self) -> None:
        """Begin to time collectives, if there is a device."""
        self._spans = None if self._device is None else []

    def mark(self) -> Any:
        """Return an event that occurs when the device has finished its work so far; None before `start`."""
        if self._spans is None or self._device is None:
            return None
        event = torch.get_device_module(self._device).Event(enable_timing=True)
        event.record()
        return event

    def add(self, began: Any) -> None:
        """Count the time from an earlier mark until now."""
        if self._spans is not None and began is not None:
            self._spans.append((began, self.mark()))

    def stop(self) -> float | None:
        """Return the seconds counted since `start`; None without a device. It must be synchronized."""
        spans, self._spans = self._spans, None
        return None if spans is None else sum(begin.elapsed_time(end) for begin, end in spans) / 1e3


def _store(placement: Placement, rendezvous: Rendezvous, sockets: SocketCollectives) -> dist.TCPStore:
    """Open the store that torch's process group needs, on rank 0, and connect to it."""
    port, server = torch.zeros(1, dtype=torch.int64), None
    if placement.rank == 0:
        server = network.open_listener(
            network.LOOPBACK if placement.one_host else rendezvous.peers[0].address
        )
        port += server.getsockname()[1]
    sockets.broadcast_(port, 0)
    return dist.TCPStore(
        rendezvous.peers[0].address or rendezvous.host,
        int(port),
        world_size=placement.size,
        is_master=server is not None,
        timeout=_STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=server.detach() if server is not None else None,
    )


def choose_backend(kinds: Sequence[str], wanted: str | None = None, *, shared: bool = False) -> str:
    """Return what carries the collectives of a group: "sockets", or torch's name of a backend.

    `kinds` are the ranks' kinds of device. Ranks on different kinds have no backend of torch in common, and
    those of GPUs do not let ranks share one (`shared`). Otherwise `wanted` is used, if it is given. Raises
    `LaunchError` for MPS, which has none.
    """
    kind, *others = set(kinds)
    if kind == "cpu" or others or shared:
        return "sockets"
    if kind == "mps":
        error = LaunchError("MPS has one device and no collectives: train with --nproc 1")
        error.on_one_rank = False
        raise error
    return wanted or dist.get_default_backend_for_device(kind)


def means_lost_peer(error: RuntimeError) -> bool:
    """Return whether a backend's error means that another process is gone."""
    return bool(_LOST.search(str(error)))
