"""Connect the ranks of a group through a store, which the launcher or rank 0 serves."""

import re
import socket
from datetime import timedelta

import torch.distributed as dist

from ..common.placement import Placement
from ..errors import Hang, LaunchError, WorkerLost
from . import port_discovery
from .membership import Membership, Peer, join_group

RENDEZVOUS_SECONDS = 300.0  # the hosts of one job can start minutes apart
_STORE_SECONDS = 30.0  # shorter, because a launcher's store exists before its processes start
_STALE = "; if that host is gone, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"


class Rendezvous:
    """The result of a rendezvous: all ranks are present and know each other.

    `listener` is a bound and listening socket for rank 0's store, if our own launcher opened one. `port` is
    the port where this rank accepts connections. `hang_after` is how many seconds processes from our own
    launcher wait for each other. Raises `LaunchError` if the other ranks cannot be reached.

    Attributes: `peers`; `attempt`, a random name that only the ranks of this attempt know; `where`, the
    store's address for messages; `store` and `heartbeat_store`, two connections to the store, because a
    call on one of them may block.
    """

    def __init__(
        self, placement: Placement, listener: socket.socket | None, port: int, hang_after: float
    ) -> None:
        store = _connect_store(placement, listener)
        self.where = f"{placement.host} port {store.port}"
        job_store = dist.PrefixStore(placement.job, store)
        try:
            membership = _join(job_store, Peer.here(placement, port), placement, self.where, hang_after)
            second = dist.PrefixStore(placement.job, _store(placement, store.port, serve=False))
        except RuntimeError as error:
            raise WorkerLost(
                f"lost rank 0 during the rendezvous at {self.where} ({reason_of(error)})"
            ) from error
        self.peers, self.attempt = membership.peers, membership.attempt
        self.store = dist.PrefixStore(self.attempt, job_store)
        self.heartbeat_store = dist.PrefixStore(self.attempt, second)


def _connect_store(placement: Placement, listener: socket.socket | None) -> dist.TCPStore:
    """Serve the group's store, or connect to it. Raises `LaunchError`."""
    serve = placement.rank == 0 and not placement.store_exists
    derived = len(placement.ports) > 1  # otherwise the launcher gave all ranks the same port
    try:
        if listener is not None and serve:
            return _store(placement, listener.getsockname()[1], serve=True, listen_fd=listener.detach())
        if not derived:
            if not serve:
                seconds, hint = (
                    (_STORE_SECONDS, _STALE) if placement.store_exists else (RENDEZVOUS_SECONDS, "")
                )
                port_discovery.wait_for(placement.host, placement.ports[0], seconds, hint)
            return _store(placement, placement.ports[0], serve=serve)
        if serve:
            store = _store(placement, 0, serve=True)
            port_discovery.announce(placement.ports, placement.job, store.port)
            return store
        port = port_discovery.find(placement.host, placement.ports, placement.job, RENDEZVOUS_SECONDS)
        return _store(placement, port, serve=False)
    except (RuntimeError, ValueError) as error:
        where = f"{placement.host}, port {placement.ports[0]}"
        raise LaunchError(f"cannot reach the group's store at {where}: {reason_of(error)}") from error


def _join(store: dist.Store, me: Peer, placement: Placement, where: str, hang_after: float) -> Membership:
    """Wait for all ranks.

    Under our own launcher the wait is shorter: it starts all processes at once and can restart them.
    """
    spawned = placement.launcher == "spawned"
    seconds = max(hang_after, _STORE_SECONDS) if spawned else RENDEZVOUS_SECONDS
    try:
        return join_group(store, me, placement.size, where=where, seconds=seconds)
    except LaunchError as error:
        raise (Hang(str(error)) if spawned else error) from None


def _store(placement: Placement, port: int, *, serve: bool, listen_fd: int | None = None) -> dist.TCPStore:
    return dist.TCPStore(
        placement.host,
        port,
        world_size=placement.size,
        is_master=serve,
        timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def reason_of(error: BaseException) -> str:
    """Return the first sentence of a backend's message, without the C++ source location in front."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^\]]*\.cc:\d+\]\s*", "", first_line).split(". ")[0]
