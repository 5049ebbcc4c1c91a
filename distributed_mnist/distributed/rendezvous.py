"""How a group meets: at a store that the launcher keeps, or rank 0, and by a roll call there."""

import re
import socket
from datetime import timedelta

import torch.distributed as dist

from ..common.placement import Placement
from ..errors import Hang, LaunchError, WorkerLost
from . import port_discovery
from .membership import Membership, Peer, meet

RENDEZVOUS_SECONDS = 300.0  # hosts of one job can be minutes apart in starting
_STORE_SECONDS = 30.0  # a store that the launcher keeps is there before we are
_STALE = "; if that host is gone, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"


class Rendezvous:
    """A group whose ranks have all met. Raises `LaunchError` if the others cannot be met.

    `listener` is a bound and listening socket for rank 0's store, where a launcher of ours holds one;
    `port` is where this rank can be reached, `hang_after` how many seconds it waits for its siblings.

    Attributes: `peers`; `word`, which only this attempt of this group knows; `where` the store is, for
    people; `store` and `signs`, two connections to it, since one may block.
    """

    def __init__(
        self, placement: Placement, listener: socket.socket | None, port: int, hang_after: float
    ) -> None:
        store = _meet(placement, listener)
        self.where = f"{placement.host} port {store.port}"
        jobs = dist.PrefixStore(placement.job, store)
        try:
            call = _everyone(jobs, Peer.here(placement, port), placement, self.where, hang_after)
            own = dist.PrefixStore(placement.job, _store(placement, store.port, serve=False))
        except RuntimeError as error:
            raise WorkerLost(f"lost rank 0 while meeting at {self.where} ({reason_of(error)})") from error
        self.peers, self.word = call.peers, call.attempt
        self.store, self.signs = dist.PrefixStore(self.word, jobs), dist.PrefixStore(self.word, own)


def _meet(placement: Placement, listener: socket.socket | None) -> dist.TCPStore:
    """The store at which the group meets, served by the launcher or by rank 0. Raises `LaunchError`."""
    serve = placement.rank == 0 and not placement.store_exists
    derived = len(placement.ports) > 1  # else the one port was told to all
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
        raise LaunchError(f"cannot meet the group at {where}: {reason_of(error)}") from error


def _everyone(
    store: dist.Store, me: Peer, placement: Placement, where: str, hang_after: float
) -> Membership:
    """The finished roll call. Processes of our own launcher come at once, and can be started again."""
    ours = placement.launcher == "spawned"
    try:
        seconds = max(hang_after, _STORE_SECONDS) if ours else RENDEZVOUS_SECONDS
        return meet(store, me, placement.size, where=where, seconds=seconds)
    except LaunchError as error:
        raise (Hang(str(error)) if ours else error) from None


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
    """The first sentence of a backend's message, without the place in its source that it begins with."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^\]]*\.cc:\d+\]\s*", "", first_line).split(". ")[0]
