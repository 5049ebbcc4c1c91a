"""torch's process group: the collectives of devices other than the CPU, and what DistributedDataParallel
speaks through on any."""

import re
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import environment
from ..common.placement import Placement
from ..errors import LaunchError
from . import port_discovery
from .rendezvous import Rendezvous, reason_of

_TIMEOUT = timedelta(hours=1)  # the backend's, which names nobody: the group's watch is there long before
_LOST = re.compile(r"gloo/transport|[Cc]onnection|\bpeer\b|NCCL|[Tt]imed? ?out|\b[Ss]tore\b", re.ASCII)


class TorchProcessGroup:
    """The same collectives as `SocketCollectives`, through torch. All ranks make it together. Raises
    `LaunchError`."""

    def __init__(
        self, placement: Placement, meeting: Rendezvous, backend: str, device: torch.device
    ) -> None:
        self._size = placement.size
        if placement.local_size < placement.size:
            others = [peer.address for peer in meeting.peers if peer.address]
            if (interface := port_discovery.interface_towards([placement.host, *others])) is not None:
                environment.use_interface(interface)
        try:
            dist.init_process_group(
                backend,
                store=meeting.store,
                rank=placement.rank,
                world_size=placement.size,
                timeout=_TIMEOUT,
                device_id=device if device.type != "cpu" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot join the group: {reason_of(error)}") from error

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`(...)` to `(size, ...)`."""
        gathered = tensor.new_empty((self._size, *tensor.shape))
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Row `j` to rank `j`."""
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows)
        return received

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """To some ranks and from some, at once."""
        calls = [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in received.items()]
        calls += [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in sent.items()]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Rank `src`'s values, in place."""
        dist.broadcast(tensor, src=src)
        return tensor

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Added up in place, in the order that suits the backend."""
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest in each place, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """The process group's backend for a device."""
    if device.type == "cpu":
        return "gloo"
    if device.type == "mps":
        raise LaunchError("MPS has one device and no collectives: train with --nproc 1")
    return dist.get_default_backend_for_device(device)


def means_lost_peer(error: RuntimeError) -> bool:
    """Whether a backend's complaint is that another process has gone."""
    return bool(_LOST.search(str(error)))
