"""Describe a process of the group to the other ranks."""

import os
import socket
from dataclasses import dataclass
from typing import Self

from ..common.placement import Placement


@dataclass(frozen=True)
class Peer:
    """One process of the group."""

    rank: int
    host: str
    pid: int
    address: str = ""
    """The address at which other hosts reach this process; empty if it is that of rank 0's host."""
    starter: str = ""
    """The `launcher_id` from the process's `Placement`."""
    port: int = 0
    """The port on which the process accepts connections; 0 if it accepts none."""

    @classmethod
    def here(cls, placement: Placement, address: str = "", port: int = 0) -> Self:
        """Describe this process."""
        return cls(placement.rank, socket.gethostname(), os.getpid(), address, placement.launcher_id, port)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"
