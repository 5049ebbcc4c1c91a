"""Set the number of threads of this process, and warn if a host has fewer cores than threads."""

import torch

from ..common import environment
from ..common.placement import usable_cores
from ..config import Sync
from ..distributed.world import World


def use_threads(world: World, sync: Sync) -> int:
    """Set and return the number of intra-op threads of this process.

    With `tree` this is one, because two threads would add in a different order. With `ddp` the processes on
    a host share its cores.
    """
    threads = 1 if sync == "tree" else max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    if world.device.type == "cuda" and sync == "tree":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return threads


def oversubscription_warnings(world: World, threads: int) -> list[str]:
    """Return a warning if this host's processes have more threads than cores, else nothing."""
    wanted, cores = world.local_size * threads, usable_cores()
    if world.device.type != "cpu" or wanted <= cores:
        return []
    if (names := environment.thread_binding()) and cores == 1:
        return [f"{' and '.join(names)} may bind all processes to one core: unset it to use more cores"]
    return [f"{world.local_size} processes share {cores} cores: same answer, slower than --nproc {cores}"]
