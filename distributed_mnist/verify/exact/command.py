"""Run the known-answer test in a group: each rank alone, all together, and pairs; again for some minutes.

The ranks go through the steps side by side. After each, they say whether they have the known sums. If one
has not, the ranks of its group repeat the step, all parts of it, and `diagnosis` compares.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ...common.compute_platform import this_platform
from ...common.process_state import defined_state
from ...distributed.world import World
from ...errors import UsageError
from ..results_table import ResultsTable
from .answer import KnownAnswer, read_answer
from .diagnosis import Finding, Report, first_difference, judge
from .injection import Injection, flip_bit
from .job import ExactJob
from .traced_pass import Trace

_PATIENCE_SECONDS = 300.0  # a slow rank may need this long for a step
EXERCISED = (
    "exercised  the memory that training takes; this processor's or accelerator's products of integers and "
    "float64 kernels;\n           with several processes, the links between them\n"
    "not        the rest of the memory; kernels that exact arithmetic does not call (fp32, bf16); disks"
)


@dataclass(frozen=True)
class Phase:
    """Ranks cut into groups. Each group does the whole job."""

    name: str
    groups: Sequence[Sequence[int]]


@defined_state()
def run(
    world: World, table: ResultsTable, *, minutes: float | None, inject: str | None, seed: int | None
) -> None:
    """Verify a group. All ranks must call it. Raises `VerificationError` on all ranks or on none."""
    deadline = time.monotonic() + 60 * (minutes or 0)
    injection = None if inject is None else Injection.parse(inject, seed or 0)
    test = Test(world, read_answer(), injection)
    table.print_line(f"known     {test.known.weights_sha256}")
    if test.injection is not None:
        table.print_line(f"injected  {test.injection}")
    table.header("the known answer")
    rounds, findings = 0, []
    failures: Counter[str] = Counter()
    while not rounds or world.on_rank_zero(lambda: time.monotonic() < deadline, bool):
        for phase in phases(world.size, rounds, pairs=minutes is not None):
            with table.busy(phase.name):
                found = test.run(phase)
            findings += found
            show(test, phase, found, table, quiet=rounds > 0)
            failures.update(test.where(finding) for finding in found)
        rounds += 1
    flipped = "".join(world.all_gather_object(test.flipped, str))
    if injection is not None and not findings:
        table.print_line(f"\nnot found: {flipped}; it has changed nothing that the answer depends on")
    table.json_fields |= {
        "weights_sha256": test.known.weights_sha256,
        "findings": [{**asdict(finding), **test.describe(finding.rank)} for finding in findings],
        "rounds": rounds,
        "failures": dict(failures),
        "injected": None if injection is None else f"{injection}: {flipped}",
        "exercised": EXERCISED,
    }
    if minutes is not None:
        counts = ", ".join(f"{where}: {count}" for where, count in failures.most_common())
        table.print_line(f"\n{rounds} rounds, {sum(failures.values())} failures{counts and ': '}{counts}")
    table.print_line(f"\n{EXERCISED}")
    table.conclude()


def phases(size: int, number: int, *, pairs: bool) -> list[Phase]:
    """Return the phases of a round. The pairs rotate from round to round (each rank meets all others)."""
    found = [Phase("alone", [[rank] for rank in range(size)])]
    if size > 1:
        found.append(Phase("together", [list(range(size))]))
    if pairs and size > 2:
        others = [*range(1, size + size % 2)]  # one rank stays in its place, the others move on
        turn = number % len(others)
        circle = [0, *others[turn:], *others[:turn]]
        couples = [sorted((circle[i], circle[-1 - i])) for i in range(len(circle) // 2)]
        found.append(Phase("pairs", [[rank for rank in couple if rank < size] for couple in couples]))
    return found


def show(
    test: "Test", phase: Phase, findings: Sequence[Finding], table: ResultsTable, *, quiet: bool
) -> None:
    """Print a line for each group, or with `quiet` only for those that failed."""
    for group, seconds in zip(phase.groups, test.seconds, strict=True):
        wrong = [finding for finding in findings if finding.rank in group]
        ranks = f"rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}"
        name = (
            f"{ranks} {phase.name}" if len(group) < test.world.size or len(group) == 1 else "all together"
        )
        for finding in wrong:
            table.problems.append(f"{name}: {test.text(finding)}")
        if wrong or not quiet:
            sha256 = None if wrong else test.known.weights_sha256
            problem = wrong and f"step {wrong[0].step}: {wrong[0].what}"
            table.add_row(name, sha256, seconds, problem, "the known answer")


class Test:
    """The test on this rank. `run` does one phase; `seconds` are then the times of its groups."""

    def __init__(self, world: World, known: KnownAnswer, injection: Injection | None) -> None:
        self.world, self.known, self.injection = world, known, injection
        world.status.enter("verifying", patience=_PATIENCE_SECONDS)
        self.job = world.on_every_rank(lambda: ExactJob(world.device))
        self.steps = len(known.steps)
        if injection and (injection.rank >= world.size or injection.step > self.steps):
            raise UsageError(
                f"--inject: there are ranks 0 to {world.size - 1} and steps 1 to {self.steps}, so no "
                f"{injection.rank}:{injection.step}"
            )
        here = this_platform(world.device)
        device = ", ".join(
            filter(None, (here.device, here.processor, here.capability, f"torch {here.torch}"))
        )
        self._devices = world.all_gather_object(device, str)
        self.seconds: list[float] = []
        self.flipped = ""
        self._damage = ("", 0)

    def describe(self, rank: int) -> dict[str, str]:
        """Return where a rank runs."""
        return {"host": self.world.peers[rank].host, "device": self._devices[rank]}

    def where(self, finding: Finding) -> str:
        """Return the rank's name, host and device."""
        place = f"{self.world.peers[finding.rank].host}, {self._devices[finding.rank]}"
        return f"rank {finding.rank} ({place})" if self.world.size > 1 else f"this process ({place})"

    def text(self, finding: Finding) -> str:
        """Describe a finding in one line."""
        return f"{self.where(finding)}: step {finding.step}: {finding.what} is wrong; {finding.repeated}"

    def run(self, phase: Phase) -> list[Finding]:
        """Do the job in each group. Every rank returns what is wrong in all of them."""
        world, job = self.world, self.job
        group = next(group for group in phase.groups if world.rank in group)
        world.on_every_rank(job.restart)
        self._damage = ("", 0)
        self._expect_weights(0, "the initial value of")
        self._kept = [value.clone() for value in job.weights()]
        last = phase.name == "together" or world.size == 1
        inject = self.injection if last else None
        failed: set[int] = set()
        findings: list[Finding] = []
        seconds = 0.0
        for step in range(self.steps):
            world.status.begin_step(step + 1)
            own: Trace = {}
            good = True
            if world.rank not in failed:
                flip = inject if inject and (inject.rank, inject.step) == (world.rank, step + 1) else None
                began = time.perf_counter()
                self._prepare_flip(flip)
                own = job.add_part(step, group.index(world.rank), len(group))
                seconds += time.perf_counter() - began
                self._exchange(group)
                if flip and flip.kind == "message":
                    self._flip(job.pass_.sums, flip)
                received = job.pass_.sums_trace()
                self._expect_weights(step, "in memory, the value of", during=step + 1)
                good = received == self.known.sums[step] and not self._damage[0]
            wrong = self._wrong_ranks(good)
            groups = [each for each in phase.groups if failed.isdisjoint(each) and wrong.intersection(each)]
            if groups:
                report = self._report(step, group, own) if group in groups else Report()
                findings += self._judge(groups, world.all_gather_object(report, Report), step)
                failed.update(rank for each in groups for rank in each)
            if len(failed) == world.size:
                break
            if world.rank not in failed:
                began = time.perf_counter()
                job.finish(step)
                self._expect_weights(step + 1, "after its optimizer step, the value of", during=step + 1)
                if not self._damage[0]:
                    for kept, value in zip(self._kept, job.weights(), strict=True):
                        kept.copy_(value)
                seconds += time.perf_counter() - began
        if world.rank not in failed and not self._damage[0] and not self._is_known_result():
            self._damage = ("the digest of the weights", self.steps)
        damages = world.all_gather_object(
            ("", 0) if world.rank in failed else self._damage, tuple[str, int]
        )
        findings += [Finding(rank, at, what, "") for rank, (what, at) in enumerate(damages) if what]
        times = world.all_gather_object(seconds, float)
        self.seconds = [max(times[rank] for rank in each) for each in phase.groups]
        return findings

    def _is_known_result(self) -> bool:
        right = self.job.weights_sha256() == self.known.weights_sha256
        return right and self.job.data_sha256 == self.known.data_sha256

    def _judge(
        self, groups: Sequence[Sequence[int]], reports: Sequence[Report], step: int
    ) -> list[Finding]:
        known = self.known.sums[step]
        return [
            finding
            for each in groups
            for finding in judge(each, [reports[rank] for rank in each], known, step + 1)
        ]

    def _expect_weights(self, step: int, what: str, during: int = 1) -> None:
        """Compare the weights with those that are known after `step` steps; remember the first damage."""
        wrong = first_difference(self.known.weights[step], self.job.weights_trace())
        if wrong and not self._damage[0]:
            self._damage = (f"{what} {wrong}", during)

    def _exchange(self, group: Sequence[int]) -> None:
        """Add the sums of the group, and take the largest magnitudes."""
        sums, now = self.job.pass_.sums, self.job.scales.now
        if len(group) == self.world.size:
            self.world.all_reduce_sum_(sums)
            self.world.all_reduce_max_(now)
        elif len(group) == 2:
            (other,) = (rank for rank in group if rank != self.world.rank)
            combine: list[tuple[torch.Tensor, Callable[..., torch.Tensor]]] = [
                (sums, torch.add),
                (now, torch.maximum),
            ]
            for mine, function in combine:
                theirs = torch.empty_like(mine)
                self.world.send_recv({other: mine}, {other: theirs})
                function(mine, theirs, out=mine)

    def _wrong_ranks(self, good: bool) -> set[int]:
        flags = self.world.all_gather(torch.tensor([int(not good)], device=self.world.device))
        return set(flags.flatten().nonzero().flatten().tolist())

    def _report(self, step: int, group: Sequence[int], own: Trace) -> Report:
        """Repeat all parts of a step, from weights that are known to be right if there are any."""
        job, received = self.job, self.job.pass_.sums_trace()
        for kept, value in zip(self._kept, job.weights(), strict=True):
            value.copy_(kept)
        again: list[Trace] = []
        sums, magnitudes = torch.zeros_like(job.pass_.sums), torch.zeros_like(job.scales.now)
        for index in range(len(group)):
            again.append(job.add_part(step, index, len(group)))
            sums += job.pass_.sums
            magnitudes = torch.maximum(magnitudes, job.scales.now)
        job.pass_.sums.copy_(sums)
        job.scales.now.copy_(magnitudes)
        what, at = self._damage
        return Report(what, at, own, received, again, job.pass_.sums_trace())

    def _prepare_flip(self, flip: Injection | None) -> None:
        """Flip a bit of a weight now, or of an activation in the pass that follows."""
        if flip is None:
            return
        rng = flip.rng()
        if flip.kind == "weight":
            self._flip(self.job.weights()[rng.randrange(len(self.job.weights()))], flip)
        elif flip.kind == "activation":
            self.job.pass_.flip_at = rng.random()
            self.job.pass_.flip = lambda x: self._flip(x, flip)

    def _flip(self, tensor: torch.Tensor, flip: Injection) -> None:
        self.flipped = flip_bit(tensor, flip.rng())
        self.injection = None  # once
