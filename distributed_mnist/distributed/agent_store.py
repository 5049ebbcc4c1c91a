"""torchrun's store, from which the ranks learn where rank 0 is.

Any process that reaches the store's port can read and change it. So it is used for this one purpose, and
rank 0 then has to prove that it belongs to the job. The store outlives a group, so it may name the rank 0
of an earlier attempt; the next read finds the new one.
"""

import json
import re
import socket
import time
from datetime import timedelta
from typing import Annotated

import msgspec
import torch.distributed as dist

from ..common.placement import Placement
from ..errors import LaunchError, reason

Port = Annotated[int, msgspec.Meta(gt=0, lt=2**16)]
_SECONDS = 30.0  # short, because the launcher's store exists before its processes start
_STALE = "; if that host is gone, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"


class AgentStore:
    """The store at MASTER_ADDR and MASTER_PORT. Raises `LaunchError` if it cannot be reached."""

    def __init__(self, placement: Placement) -> None:
        host, port = placement.host, placement.ports[0]
        _wait_for(host, port)
        try:
            store = dist.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=_SECONDS), wait_for_workers=False
            )
        except RuntimeError as error:
            raise LaunchError(
                f"cannot reach torchrun's store at {host}:{port}: {reason_of(error)}"
            ) from None
        self._store = dist.PrefixStore(placement.job, store)

    def publish(self, address: str, port: int) -> None:
        """Say where rank 0 accepts connections. An empty address is the store's own host."""
        self._store.set("rank 0", json.dumps([address, port]))

    def rank_zero(self) -> tuple[str, int]:
        """Return the address (empty: the store's host) and port of rank 0. Raises `OSError` without one."""
        try:
            if not self._store.check(["rank 0"]):
                raise ConnectionError("it has not started yet")
            address, port = msgspec.json.decode(self._store.get("rank 0"), type=tuple[str, Port])
        except (RuntimeError, msgspec.MsgspecError) as error:
            raise ConnectionError(reason_of(error)) from error
        return address, port


def _wait_for(host: str, port: int) -> None:
    """Wait until something listens. The store's client would also wait, but without signal handlers."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"nothing listens at {host} port {port}: {reason(error)}{_STALE}"
                ) from None
        time.sleep(0.02)


def reason_of(error: BaseException) -> str:
    """Return the first sentence of a backend's message, without the C++ source location in front."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^\]]*\.cc:\d+\]\s*", "", first_line).split(". ")[0]
