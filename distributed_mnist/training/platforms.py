"""Make the ranks compute alike: with `tree`, all must use one thread and choose the same kernels."""

from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..common.compute_platform import differences, this_platform
from ..common.digest import digest
from ..common.placement import usable_cores
from ..config import Sync
from ..distributed.world import World
from ..errors import UsageError

_ADVICE = (
    "start all ranks on processors of one kind with the same settings, or give all of them the same "
    "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_CBWR, or use --sync ddp "
    "(docs/how-to/when-hashes-differ.md)"
)


def require_same_platform(world: World, sync: Sync) -> list[str]:
    """Compare the ranks' platforms. Return notices about differences that may change the last bits.

    With `tree`, ranks that use different kernels raise `UsageError`, because the weights would depend on
    which rank computes which shard. With `ddp`, this is a notice too. All ranks must call it.
    """
    here = this_platform(world.device)
    problem = _differing(world, here.kernels())
    if problem and sync == "tree":
        raise UsageError(f"{problem}: the weights would depend on which rank computes what; {_ADVICE}")
    problem = problem or _differing(world, asdict(here))
    return [f"{problem}: the last bits may depend on which rank computes what"] if problem else []


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


def _differing(world: World, platform: Mapping[str, str]) -> str | None:
    """Say which ranks differ from rank 0, and in what the first of them does. None if none does."""
    others = world.differing(digest(dict(platform)))
    if not others:
        return None
    first, other = (world.broadcast_object(dict(platform), dict[str, str], rank) for rank in (0, others[0]))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    texts = differences(other, first, ("there", "on rank 0"))
    if missing := sorted(first.keys() ^ other.keys()):  # the two have other kinds of devices or limits
        texts.append(f"{', '.join(missing)} only on one of them")
    return f"{world.peers[others[0]]}{more} does not compute like rank 0 ({'; '.join(texts)})"
