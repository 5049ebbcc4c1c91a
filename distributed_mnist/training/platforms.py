"""Make the ranks compute alike: with `tree`, all must use one thread and choose the same kernels.

The hardware also chooses the precision of a recipe that leaves it open (`auto`). Timing never does.
"""

from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..common import environment
from ..common.compute_platform import differences, multiplies_bf16, this_platform
from ..common.digest import digest
from ..common.placement import physical_cores
from ..config import Recipe, Sync
from ..distributed.peer import ranks_by_device
from ..distributed.world import World
from ..errors import UsageError
from ..gradients.cross_check import all_true

_ADVICE = (
    "start all ranks on processors of one kind with the same settings, or give all of them the same "
    "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_CBWR, or use --sync ddp "
    "(docs/how-to/when-hashes-differ.md)"
)


def agree_on_platform(world: World, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Compare the ranks' platforms. Return the recipe with one precision on all ranks, and notices.

    A recipe that leaves it open gets bf16 if all ranks have the hardware for it, otherwise fp32. All ranks
    must call it. Raises `UsageError`, see `require_one_kind` and `require_same_platform`.
    """
    if recipe.precision == "exact":  # every platform computes the same
        if any(peer.device == "mps" for peer in world.peers):
            raise UsageError("--precision exact needs float64, which MPS does not have: add --device cpu")
        return recipe, []
    require_one_kind(world, "add --precision exact, where they do not, or --device cpu")
    notices = require_same_platform(world, recipe.sync)
    has_bf16 = all_true(world, multiplies_bf16(world.device))
    if recipe.precision == "auto":
        return recipe.replace(precision="bf16" if has_bf16 else "fp32"), notices
    if recipe.precision == "bf16" and not has_bf16:  # a run that is resumed can no longer change it
        notices.append("this hardware emulates bf16: a new run with --precision fp32 would be faster")
    return recipe, notices


def require_one_kind(world: World, advice: str) -> None:
    """Raise `UsageError` with this advice if the ranks compute on different kinds of device."""
    if len({peer.device for peer in world.peers}) > 1:
        raise UsageError(
            f"{ranks_by_device(world.peers)}: different kinds of device give different last bits; {advice}"
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


def use_threads(world: World, recipe: Recipe) -> int:
    """Set and return the number of intra-op threads of this process.

    With `tree` this is one, because two threads would add in a different order. In exact arithmetic they do
    not change the result: there are as many as `OMP_NUM_THREADS` says, by default one, because processes
    share work better. With `ddp` the processes on a host share its cores.
    """
    exact = recipe.precision == "exact"
    in_order = recipe.sync == "tree" and not exact
    threads = 1 if in_order else max(1, physical_cores() // world.local_size)
    if exact:
        threads = environment.threads() or 1
    torch.set_num_threads(threads)
    if world.device.type == "cuda" and in_order:
        # `torch.use_deterministic_algorithms` does the same, but imports torch's compiler: seconds.
        torch.set_deterministic_debug_mode("warn")
        torch._C._set_deterministic_fill_uninitialized_memory(False)  # by a kernel for each new tensor
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
