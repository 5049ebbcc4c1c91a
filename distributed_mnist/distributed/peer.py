"""Describe a process of the group, and its job, to the other ranks.

Two jobs can use the same MASTER_PORT by mistake. Without a description of the job, a rank of one would
train for the other.
"""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..common.installed import version
from ..common.placement import Placement
from ..config import DATA_OPTIONS, Recipe, Run, flag

JobDescription = Mapping[str, str]
"""What must be equal on all ranks: for each flag or other name, its value as text."""


_OPTIONS = ("checkpoint_every", "hang_after", "balance", "oversubscribe", "cuda_graphs")
"""Options that decide how and when the ranks call collectives, how long they wait, who computes what."""
_MOST_SHOWN = 8  # ranks in a message


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
    device: str = "cpu"
    """The kind of device on which the process computes, in torch's words: cpu, cuda, ..."""

    @classmethod
    def here(cls, placement: Placement, address: str = "", port: int = 0, *, device: str = "cpu") -> Self:
        """Describe this process."""
        host, pid = socket.gethostname(), os.getpid()
        return cls(placement.rank, host, pid, address, placement.launcher_id, port, device)

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def describe_devices(peers: Sequence[Peer]) -> str:
    """Say on which kind of device the processes compute: "cpu", or "2 on cpu, 1 on cuda"."""
    counts = Counter(peer.device for peer in peers)
    if len(counts) == 1:
        return peers[0].device
    return ", ".join(f"{count} on {kind}" for kind, count in counts.items())


def ranks_by_device(peers: Sequence[Peer]) -> str:
    """Say which ranks are on which kind of device: "rank 0, 1 on cpu, rank 2 on cuda"."""
    ranks: dict[str, list[int]] = {}
    for peer in peers:
        ranks.setdefault(peer.device, []).append(peer.rank)
    parts = []
    for kind, those in ranks.items():
        more = f" and {len(those) - _MOST_SHOWN} more" if len(those) > _MOST_SHOWN else ""
        parts.append(f"rank {', '.join(map(str, those[:_MOST_SHOWN]))}{more} on {kind}")
    return ", ".join(parts)


def describe_job(command: str, **values: object) -> JobDescription:
    """Describe a job by its command, and by flags: the name of a flag's field, and its value."""
    named = {flag(name): "not given" if value is None else str(value) for name, value in values.items()}
    return {"command": command, "dmnist": version("distributed-mnist"), **named}


def describe_training(command: str, recipe: Recipe, options: Run, *, one_host: bool) -> JobDescription:
    """Describe a job that trains. `one_host` is whether all ranks are on one host."""
    values = {
        **recipe.to_dict(),
        **{name: getattr(options, name) for name in (*DATA_OPTIONS, *_OPTIONS)},
        "data": common_path(options.data, one_host=one_host) if one_host else None,  # rank 0 reads it
        "out": common_path(options.out, one_host=one_host),
        # Any rank may see the checkpoint at another path, but all must expect to resume.
        "resume": options.resume if options.resume in (None, "auto") else "a checkpoint",
    }
    return describe_job(command, **values)


def common_path(path: Path | None, *, one_host: bool) -> str | None:
    """Return what ranks must have in common of a path. Hosts may have it in different places."""
    if path is None:
        return None
    return str(path.absolute()) if one_host else path.name


def job_differences(there: JobDescription, here: JobDescription) -> str:
    """Say what is different in two descriptions; empty if nothing is."""
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return ", ".join(
        f"{name} {there.get(name, 'unknown')} there and {here.get(name, 'unknown')} here" for name in names
    )
