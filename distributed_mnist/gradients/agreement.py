"""Find out whether ranks compute the same, and if not, which of them computes something else.

All ranks add the same gradients and so have the same weights, even if one of them computes wrong gradients.
Therefore each rank repeats a part of the next rank's work, and the ranks compare digests. If two differ,
every rank repeats that part. Then the majority is right, unless ranks do not even agree with themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..common.compute_platform import this_platform
from ..distributed.world import World
from ..errors import DmnistError, TrainingError, UsageError


@dataclass(frozen=True)
class Results:
    """The digests (hexadecimal SHA-256) of one piece of work, as one rank computed it several times."""

    usual: list[str]
    """Computed as in training, where several shards may share a pass."""
    alone: list[str]
    """Computed in a pass of its own."""
    fresh: list[str]
    """Computed in a pass of its own, on a copy of the model that has made no other pass."""

    def each_unchanged(self) -> bool:
        """Return whether each way gave one result only."""
        return all(len(set(digests)) <= 1 for digests in (self.usual, self.alone, self.fresh))


@dataclass(frozen=True)
class Disagreement:
    """Results that differ."""

    kind: str
    """"state": the model gives something else when it is repeated. "copy": a fresh copy of the model gives
    something else. "pass": shards in one pass give something else than alone. "rank": some ranks give
    something else than the others. "ranks": the same, but no majority is right."""
    groups: Sequence[Sequence[int]] = ()
    """Of "rank" and "ranks": ranks with equal results. For "rank", only those in the wrong."""

    def error(self, world: World, model: str, what: str) -> DmnistError:
        """Return the error to raise. `what` is a plural: "gradients". Every rank must call this.

        `model` is the model's name.
        """
        processors = world.all_gather_object(_processor(world), str)
        if self.kind in ("state", "copy"):
            differ = (
                "change when a pass is repeated"
                if self.kind == "state"
                else "differ from those of a fresh copy"
            )
            on_gpu = " or uses an operation that is not deterministic on this device"
            uneven = "" if world.device.type == "cpu" else on_gpu
            return UsageError(
                f"{_the(model)}: its {what} {differ} with the same weights and images: it "
                "keeps state between passes (a counter, an average in a plain attribute) or draws random "
                f"numbers in a way of its own{uneven}; its results would depend on the number of processes"
            )
        if self.kind == "pass":
            return TrainingError(
                f"{_the(model)}: it gives some images {what} that depend on the other images in the pass"
            )

        def named(rank: int) -> str:
            return f"rank {rank} ({world.peers[rank].host}, {processors[rank]})"

        why = (
            "another processor, other settings of its libraries, faulty hardware, or a model whose results "
            "depend on something outside of it, such as a global variable"
        )
        if self.kind == "rank":
            wrong = " and ".join(named(rank) for rank in self.groups[0])
            verb = "computes" if len(self.groups[0]) == 1 else "compute"
            return TrainingError(f"{wrong} {verb} different {what} from the other ranks: {why}")
        each = " and ".join(", ".join(map(named, group)) for group in self.groups)
        return TrainingError(f"{each} compute different {what}: {why}")


def compare(world: World, mine: str, theirs: str, repeat: Callable[[int], Results]) -> Disagreement | None:
    """Compare work between neighbours; return None if all agree. Every rank must call it.

    `mine` is the digest of this rank's own piece of work, as in training. `theirs` is that of the next
    rank's piece, as this rank computes it on a fresh copy. `repeat(rank)` computes that rank's piece again.
    """
    pair = torch.frombuffer(bytearray.fromhex(mine + theirs), dtype=torch.uint8).to(world.device)
    own, by_previous = world.all_gather(pair).view(world.size, 2, -1).unbind(1)
    differs = (own != by_previous.roll(1, 0)).any(1).nonzero().flatten().tolist()
    if not differs:
        return None
    owner = differs[0]
    results = repeat(owner)
    if world.rank == owner:
        results.usual.append(mine)
    if (world.rank + 1) % world.size == owner:
        results.fresh.append(theirs)
    return judge(world.all_gather_object(results, Results))


def judge(everyone: Sequence[Results]) -> Disagreement:
    """Explain different results of one piece of work; `everyone` is by rank."""
    size = len(everyone)
    changing = [rank for rank, results in enumerate(everyone) if not results.each_unchanged()]
    if 2 * len(changing) > size:
        return Disagreement("state")
    if changing:
        return Disagreement("rank", [changing])
    by_result: dict[str, list[int]] = {}
    for rank, results in enumerate(everyone):
        by_result.setdefault(results.alone[0], []).append(rank)
    groups = sorted(by_result.values(), key=len)
    if len(groups) == 1:
        apart = any(results.usual[:1] != results.alone[:1] for results in everyone if results.usual)
        return Disagreement("pass" if apart else "copy")
    if 2 * len(groups[-1]) > size:
        return Disagreement("rank", [sorted(rank for group in groups[:-1] for rank in group)])
    return Disagreement("ranks", sorted(groups))


def _the(model: str) -> str:
    return f"--model {model}" if model else "the model"


def _processor(world: World) -> str:
    """Describe what decides the last bits here: the processor, and variables that choose kernels."""
    here = this_platform(world.device)
    return ", ".join(filter(None, (here.processor, here.capability, here.settings)))
