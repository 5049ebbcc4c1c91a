"""Describe a process of the group to the other ranks."""

import os
import socket
from dataclasses import dataclass
from typing import Self

from ..common.placement import Placement
from .network import address_towards


@dataclass(frozen=True)
class Peer:
    """One process of the group."""

    rank: int
    host: str
    pid: int
    address: str = ""
    """The host's address on the route to rank 0's host; empty if all ranks are on one host."""
    starter: str = ""
    """The `launcher_id` from the process's `Placement`."""
    port: int = 0
    """The port on which the process accepts connections; 0 if it accepts none."""

    @classmethod
    def here(cls, placement: Placement, port: int = 0) -> Self:
        """Describe this process."""
        address = "" if placement.one_host else address_towards(placement.host)
        return cls(placement.rank, socket.gethostname(), os.getpid(), address, placement.launcher_id, port)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"
