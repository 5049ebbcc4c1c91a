"""Where a process stands in its group, and what its host offers. Known before torch is imported."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where a process stands in its group, and where the group meets. Alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "127.0.0.1"
    """Address of rank 0's host, where the store listens."""
    ports: tuple[int, ...] = ()
    """Ports to try there, the same list on every rank."""
    store_exists: bool = False
    """The launcher serves the store itself (torchrun does)."""
    job: str = "dmnist"
    """The job's name: the same on all its ranks and in every attempt, other jobs' differ."""
    starter: str = ""
    """Which launcher started this process: the same through its restarts, another's differs. Empty for a
    launcher that does not start a process again."""
    parent: int = 0
    """Process without which this one shall not go on; 0 if there is none."""
    restarts: int = 0
    """How often the launcher says that it has started this group again."""
    own_device: bool = False
    """The launcher shows each process its own device only (Slurm's --gpus-per-task)."""
    launcher: str = "alone"


ALONE = Placement()


def usable_cores() -> int:
    """Processor cores this process may use: its affinity, or less where a container's quota says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123
            quota, period = file.read().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # not Linux, an older cgroup, or "max": no quota
        return cores
