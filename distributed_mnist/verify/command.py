"""Run the known-answer test in a group: each rank alone, all together, and in pairs; for some minutes."""

import time
from collections import Counter
from dataclasses import asdict

from ..common.compute_platform import this_platform
from ..common.process_state import defined_state
from ..distributed.world import World
from .answer import read_answer
from .diagnosis import Finding, Suspect, suspect
from .injection import Injection
from .phases import Phase, PhaseRunner, phases
from .results_table import ResultsTable

_PATIENCE_SECONDS = 300.0  # a slow rank may need this long for a step
_EXERCISED = "the memory of training, integer and float64 kernels"
_NOT_EXERCISED = "other memory, kernels for fp32 and bf16, disks"


@defined_state()
def run(
    world: World, table: ResultsTable, *, minutes: float | None, inject: str | None, seed: int | None
) -> None:
    """Verify a group. All ranks must call it. Raises `VerificationError` on all ranks or on none."""
    began, known = time.monotonic(), read_answer()
    injection = None if inject is None else Injection.parse(inject, seed or 0)
    if injection is not None:
        injection.require(world.size, len(known.steps))
    world.status.enter("verifying", patience=_PATIENCE_SECONDS)
    with table.busy("preparing"):
        runner, suspects = PhaseRunner(world, known, injection), Suspects(world)
    table.print_line(f"known     {known.weights_sha256[-1]}")
    if injection is not None:
        table.print_line(f"injected  {injection}")
    table.header("trained by")
    rounds = 0
    while not rounds or world.on_rank_zero(lambda: time.monotonic() - began < 60 * (minutes or 0), bool):
        rounds += 1
        for phase in phases(world.size, rounds - 1, pairs=minutes is not None):
            when = f"{phase.name}, round {rounds}" if minutes is not None else phase.name
            with table.busy(when):
                findings = runner.run(phase)
            for finding in findings:
                suspects.add(finding, phase, when)
            show(phase, findings, runner, table, f", round {rounds}" if rounds > 1 else "")
    flipped = "".join(world.all_gather_object(runner.flipped, str))
    if minutes is not None:
        seconds = time.monotonic() - began
        table.print_line(
            f"\n{counted(rounds, 'round')} in {seconds:.0f} s, {counted(suspects.failures, 'failure')}"
        )
    if injection is not None and not suspects.failures:
        table.print_line(f"\nnot found: {flipped}; this changes nothing that is computed")
    exercised = _EXERCISED + (", links" if world.size > 1 else "")
    table.print_line(f"\nexercised      {exercised}\nnot exercised  {_NOT_EXERCISED}")
    table.problems += suspects.lines()
    table.json_fields |= {
        "weights_sha256": known.weights_sha256[-1],
        "rounds": rounds,
        "failures": suspects.failures,
        "suspects": suspects.as_json(),
        "findings": suspects.findings,
        "injected": None if injection is None else f"{injection}: {flipped}",
        "exercised": exercised,
        "not_exercised": _NOT_EXERCISED,
    }
    table.conclude()


def show(
    phase: Phase, findings: list[Finding], runner: PhaseRunner, table: ResultsTable, suffix: str
) -> None:
    """Print a row for each group; with a `suffix`, in a later round, only for those that failed."""
    for group, seconds in zip(phase.groups, runner.seconds, strict=True):
        wrong = next((finding for finding in findings if finding.rank in group), None)
        if wrong is not None or not suffix:
            sha256 = None if wrong else runner.known.weights_sha256[-1]
            problem = wrong and f"wrong in step {wrong.step}"
            table.add(f"{phase.name_of(group)}{suffix}", sha256, seconds, problem, "the known answer")


class Suspects:
    """What has failed so far, and how often."""

    def __init__(self, world: World) -> None:
        here = this_platform(world.device)
        parts = (here.device, here.processor, here.capability, f"torch {here.torch}")
        self._devices = world.all_gather_object(", ".join(filter(None, parts)), str)
        self._peers, self._size = world.peers, world.size
        self._counts: Counter[Suspect] = Counter()
        self._first: dict[Suspect, str] = {}
        self.findings: list[dict[str, object]] = []
        """As `--json` shows them."""

    @property
    def failures(self) -> int:
        """How many findings there were."""
        return len(self.findings)

    def add(self, finding: Finding, phase: Phase, when: str) -> None:
        """Count a finding."""
        group = phase.group_of(finding.rank)
        found = suspect(finding, group)
        self._counts[found] += 1
        repeated = finding.repeated and f"; {finding.repeated}"
        text = f"{finding.what} is wrong{repeated}"
        if finding.received:
            text = f"rank {finding.rank} received a wrong sum ({finding.what})"
        self._first.setdefault(found, f"{when}, step {finding.step}: {text}")
        place = {"host": self._peers[finding.rank].host, "device": self._devices[finding.rank]}
        self.findings.append({**asdict(finding), **place, "ranks": list(group), "when": when})

    def name(self, found: Suspect) -> str:
        """Return the name of a device or a link, and where it is."""
        rank, host = f"rank {found.rank}", self._peers[found.rank].host
        if found.sender is None:
            return f"{rank if self._size > 1 else 'this process'} ({host}, {self._devices[found.rank]})"
        if found.sender == -1:
            return f"a link to {rank} ({host})"
        return f"the link from rank {found.sender} ({self._peers[found.sender].host}) to {rank} ({host})"

    def lines(self) -> list[str]:
        """Return a line for each suspect: what it did first, and how often it failed."""
        return [
            f"{self.name(found)}: {self._first[found]}{f' ({count} times)' if count > 1 else ''}"
            for found, count in self._counts.most_common()
        ]

    def as_json(self) -> list[dict[str, object]]:
        """Return the suspects."""
        return [
            {
                "what": "device" if found.sender is None else "link",
                "name": self.name(found),
                "failures": count,
            }
            | {"rank": found.rank, "sender": found.sender if found.sender != -1 else None}
            for found, count in self._counts.most_common()
        ]


def counted(count: int, noun: str) -> str:
    """Return `1 round` or `2 rounds`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
