"""Describe a process of the group, and its job, to the other ranks.

Two jobs can use the same MASTER_PORT by mistake. Without a description of the job, a rank of one would
train for the other.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..common.installed import version
from ..common.placement import Placement
from ..config import DATA_OPTIONS, Recipe, Run, flag

JobDescription = Mapping[str, str]
"""What must be equal on all ranks: for each flag or other name, its value as text."""


_OPTIONS = ("checkpoint_every", "hang_after", "balance")
"""Options that decide when the ranks call collectives, how long they wait there, and who computes what."""


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
