"""One phase of the known-answer test: ranks in groups, each of which does the whole job, step by step.

All ranks go through the steps side by side. After each one they say whether their results are the known
ones. If not, the ranks of that group repeat the step, all parts of it, and `diagnosis` compares.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..distributed.world import World
from .answer import KnownAnswer
from .diagnosis import Finding, Report, first_difference, judge
from .injection import Injection, flip_bit
from .job import ExactJob


@dataclass(frozen=True)
class Phase:
    """Groups of ranks, each of which does the whole job. A rank in no group waits."""

    name: str
    groups: Sequence[Sequence[int]]
    last: bool = False
    """Whether a bit that is flipped only once is flipped in this phase."""

    def group_of(self, rank: int) -> Sequence[int]:
        """Return a rank's group; an empty one if it has none."""
        return next((group for group in self.groups if rank in group), ())

    def name_of(self, group: Sequence[int]) -> str:
        """Name a group, as a row of the table does."""
        if len(group) == 1:
            return f"rank {group[0]} alone"
        return f"ranks {group[0]} and {group[1]}" if self.name == "in pairs" else self.name


def phases(size: int, number: int, *, pairs: bool) -> list[Phase]:
    """Return the phases of a round. The pairs rotate from round to round: each rank meets all others."""
    found = [Phase("each rank alone", [[rank] for rank in range(size)], last=size == 1)]
    if size > 1:
        found.append(Phase("all together", [list(range(size))], last=True))
    if pairs and size > 2:
        others = [*range(1, size + size % 2)]  # one rank stays in its place, the others move on
        turn = number % len(others)
        circle = [0, *others[turn:], *others[:turn]]
        couples = [sorted((circle[i], circle[-1 - i])) for i in range(len(circle) // 2)]
        found.append(Phase("in pairs", [couple for couple in couples if couple[1] < size]))
    return found


class PhaseRunner:
    """The test on this rank. All ranks call `run` with the same phases.

    Attributes: `known`, `seconds` (how long each group of the latest phase computed), `flipped` (which bit
    was flipped on this rank; empty if none was yet).
    """

    def __init__(self, world: World, known: KnownAnswer, injection: Injection | None) -> None:
        self._world, self.known, self._injection = world, known, injection
        self._job = world.on_every_rank(lambda: ExactJob(world.device))
        self.seconds: list[float] = []
        self.flipped = ""

    def run(self, phase: Phase) -> list[Finding]:
        """Do the job in each group. Every rank returns what is wrong in all of them."""
        world, job, group = self._world, self._job, phase.group_of(self._world.rank)
        seconds = 0.0
        # The ranks that do not go on: they have no group, or it has failed.
        out = {rank for rank in range(world.size) if not phase.group_of(rank)}
        findings: list[Finding] = []

        def fail(found: Sequence[Finding]) -> None:
            findings.extend(found)
            out.update(rank for finding in found for rank in phase.group_of(finding.rank))

        world.on_every_rank(job.restart)
        fail(self._compare_weights(0, "the initial value of", out))
        for step in range(len(self.known.steps)):
            world.status.begin_step(step + 1)
            report = Report()
            if world.rank not in out:
                due = self._injection and self._injection.due(world.rank, step + 1, group, last=phase.last)
                flip = self._injection if due else None
                began = time.perf_counter()
                self._prepare_flip(flip)
                job.add_part(step, group.index(world.rank), len(group))
                seconds += time.perf_counter() - began
                report = self._exchange(step, group, flip)
            right = world.rank in out or (not report.damage and report.received == self.known.steps[step])
            wrong = self._ranks_where(not right)
            groups = [each for each in phase.groups if wrong.intersection(each)]
            if groups:
                if group in groups:
                    report = self._repeat(step, len(group), report)
                reports = world.all_gather_object(report, Report)
                for each in groups:
                    fail(judge(each, [reports[rank] for rank in each], self.known.steps[step], step + 1))
            if world.rank not in out:
                began = time.perf_counter()
                job.finish(step)
                seconds += time.perf_counter() - began
            fail(self._compare_weights(step + 1, "after the optimizer's step, the value of", out))
            if len(out) == world.size:
                break
        times = world.all_gather_object(seconds, float)
        self.seconds = [max(times[rank] for rank in each) for each in phase.groups]
        return findings

    def _compare_weights(self, step: int, where: str, out: set[int]) -> list[Finding]:
        """Compare the weights after so many steps with the known ones, and keep them if they are right."""
        job, known, what = self._job, self.known, ""
        if self._world.rank not in out:
            if job.data_sha256 != known.data_sha256:
                what = "the digest of the data"
            elif job.weights_sha256() != known.weights_sha256[step]:
                what = f"{where} {first_difference(known.weights[step], job.weights_trace()) or 'a weight'}"
            else:
                job.keep()
        if not self._ranks_where(bool(what)):
            return []
        everywhere = self._world.all_gather_object(what, str)
        return [Finding(rank, max(step, 1), text) for rank, text in enumerate(everywhere) if text]

    def _exchange(self, step: int, group: Sequence[int], flip: Injection | None) -> Report:
        """Combine the results of the group, and report what this rank has computed and received."""
        world, job = self._world, self._job
        own = job.trace()
        if len(group) == world.size:
            world.all_reduce_sum_(job.pass_.sums.flat)
            world.all_reduce_sum_(job.pass_.checksums)
            world.all_reduce_max_(job.scales.now)
        elif len(group) > 1:
            (other,) = (rank for rank in group if rank != world.rank)
            for mine, combine in job.results():
                theirs = torch.empty_like(mine)
                world.send_recv({other: mine}, {other: theirs})
                combine(mine, theirs, out=mine)
        if flip and flip.kind == "message":
            self._flip(job.pass_.sums.flat, flip)
        damaged = first_difference(self.known.weights[step], job.weights_trace())
        damage = f"in memory, the value of {damaged}" if damaged else ""
        return Report(damage, own, job.trace() if len(group) > 1 else own)

    def _repeat(self, step: int, parts: int, report: Report) -> Report:
        """Repeat all parts of a step, from weights that are known to be right, and add to the report."""
        job, again = self._job, []
        job.take_back()
        totals: list[torch.Tensor] = []
        for index in range(parts):
            job.add_part(step, index, parts)
            again.append(job.trace())
            results = job.results()
            totals = totals or [torch.zeros_like(result) for result, _ in results]
            for total, (result, combine) in zip(totals, results, strict=True):
                combine(total, result, out=total)
        for total, (result, _) in zip(totals, job.results(), strict=True):
            result.copy_(total)
        return replace(report, again=again, total=job.trace())

    def _ranks_where(self, flag: bool) -> set[int]:
        flags = self._world.all_gather(torch.tensor([int(flag)], device=self._world.device))
        return set(flags.flatten().nonzero().flatten().tolist())

    def _prepare_flip(self, flip: Injection | None) -> None:
        """Flip a bit of a weight now, or of an activation in the pass that follows."""
        if flip and flip.kind == "weight":
            rng = flip.rng()
            self._flip(self._job.weights()[rng.randrange(len(self._job.weights()))], flip)
        elif flip and flip.kind == "activation":
            self._job.pass_.flip_at = flip.rng().random()
            self._job.pass_.flip = lambda x: self._flip(x, flip)

    def _flip(self, tensor: torch.Tensor, flip: Injection) -> None:
        self.flipped = flip_bit(tensor, flip.rng())
        if flip.sender is None:  # a bad link is bad again and again
            self._injection = None
