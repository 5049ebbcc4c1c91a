"""A process's rank in its group, and the cores of its host. Needs no torch."""

import ipaddress
import os
from dataclasses import dataclass, field

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True)
class Placement:
    """A process's rank and world size, and the address of the rendezvous. By default a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "127.0.0.1"
    """Address of rank 0's host; with `store_exists`, of the store's host."""
    ports: tuple[int, ...] = ()
    """Ports of rank 0 to try, the same on every rank; with `store_exists`, the store's port."""
    store_exists: bool = False
    """Whether the launcher serves the store itself, as torchrun does."""
    job: str = "dmnist"
    """The job's name: the same on all its ranks and in every attempt, but different for each job."""
    launcher_id: str = ""
    """Identifies the launcher that started this process: the same after each restart, different for each
    launcher. Empty if the launcher does not restart processes."""
    parent: int = 0
    """Id of the process whose end stops this process; 0 if there is none."""
    launcher_pid: int = 0
    """Id of our own launcher's process, which forwards signals to all ranks; 0 under any other."""
    restarts: int = 0
    """How many times the launcher has restarted this group, according to the launcher."""
    own_device: bool = False
    """Whether each process sees only its own device (Slurm's --gpus-per-task)."""
    launcher: str = "alone"
    """The launcher's name: alone, spawned (our own), torchrun, environment, srun or mpirun."""
    secret: bytes = field(default=b"", repr=False)
    """What only the ranks know: random bytes from our own launcher, or what the user provides."""

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on one host."""
        return self.local_size == self.size or is_loopback(self.host)


ALONE = Placement()


def is_loopback(host: str) -> bool:
    """Return whether `host` is an address, or the name, of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, or less if a container's quota is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123
            quota, period = file.read().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # not Linux, an older cgroup, or "max": no quota
        return cores


def physical_cores() -> int:
    """Return `usable_cores`, but count the hardware threads of one core as one.

    They share its arithmetic units, so a second process or thread there gains little. torch has as many
    threads by default.
    """
    cores = set[str]()
    try:
        for thread in os.sched_getaffinity(0):
            with open(_SIBLINGS.format(thread)) as file:  # noqa: PTH123
                cores.add(file.read())
    except (AttributeError, OSError):  # not Linux, or a container that hides it
        return usable_cores()
    return min(usable_cores(), len(cores))
