"""`dmnist verify --chaos`: the same job, and a seed full of faults. Every run must come to the answer of
the one that nothing was done to."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from .compare import Answer, compare
from .faults import FAULTS
from .job import RunFailedError, undisturbed
from .results_table import ResultsTable, Row
from .run_with_faults import LONGER, FaultyRun, RunEndedError

_MOST_AT_ONE_RUN = 6
_MOST_FAILURES = 5
_MOST_IN_VAIN = 10  # runs in a row that were over before any fault struck


@dataclass(frozen=True)
class InjectedFault:
    """A fault that struck."""

    kind: str
    what: str
    recovery: float | None
    """Seconds to the first new steps."""


@dataclass
class ChaosRun:
    """A run under faults, as it went."""

    name: str
    sizes: list[int] = field(default_factory=list)
    blows: list[InjectedFault] = field(default_factory=list)
    answer: Answer | None = None
    wrong: str | None = None


def soak(most: int, device: str, faults: int, seed: int, folder: Path, board: ResultsTable) -> None:
    """Runs with `faults` faults in all at 1 to `most` processes, as `seed` has them."""
    board.say(f"\nchaos     {faults} fault{'s' if faults > 1 else ''}, --seed {seed}", "bold")
    began = time.monotonic()
    with board.busy("an undisturbed run"):
        try:
            reference = undisturbed(folder / "chaos-undisturbed", 1, device, *LONGER)
        except RunFailedError as error:
            board.wrong.append(f"chaos, before any fault: {error}")
            return
    board.head("under faults")
    board.add(
        Row("a longer job, undisturbed", True, "reference", reference.sha256, time.monotonic() - began)
    )
    deck = _shuffled(Random(seed))
    blows: list[InjectedFault] = []
    number = failures = in_vain = 0
    while len(blows) < faults and failures < _MOST_FAILURES and in_vain < _MOST_IN_VAIN:
        number += 1
        began = time.monotonic()
        with board.busy(f"run {number}, {len(blows)} of {faults} faults so far"):
            room = faults - len(blows)
            passage = _passage(number, most, device, deck, seed, folder, reference, room)
        blows += passage.blows
        failures += passage.wrong is not None
        in_vain = 0 if passage.blows else in_vain + 1
        _show(passage, seed, time.monotonic() - began, board)
    if in_vain == _MOST_IN_VAIN:
        board.wrong.append(f"chaos: {in_vain} runs in a row ended before a fault struck")
    board.fields["chaos"] = _summary(blows, number, failures, seed)
    _show_summary(board)


def _passage(
    number: int,
    most: int,
    device: str,
    deck: Iterator[str],
    seed: int,
    folder: Path,
    reference: Answer,
    room: int,
) -> ChaosRun:
    rng = Random(f"{seed}/{number}")
    passage = ChaosRun(f"run {number}")
    try:
        with FaultyRun(folder / f"chaos-{number}", most, device, rng) as run:
            passage.sizes = run.sizes
            for _, kind in zip(range(min(room, rng.randint(1, _MOST_AT_ONE_RUN))), deck, strict=False):
                if blow := _struck(run, kind):
                    passage.blows.append(blow)
            passage.answer = run.answer()
            passage.wrong = (difference := compare(reference, passage.answer)) and str(difference)
    except RunFailedError as error:
        passage.wrong = str(error)
    return passage


def _struck(run: FaultyRun, kind: str) -> InjectedFault | None:
    """Let a fault strike at some moment and the run recover; None if it was over before."""
    try:
        if kind != "kill at start-up" or run.moving():
            run.await_moment()
        what = FAULTS[kind](run)
        return InjectedFault(kind, what, run.recovery())
    except RunEndedError:
        return None
    except RunFailedError as error:
        raise RunFailedError(f"{kind}: {error}") from error


def _shuffled(rng: Random) -> Iterator[str]:
    """Kinds of faults for ever, in rounds: a few of them are of different kinds already."""
    while True:
        yield from rng.sample(list(FAULTS), len(FAULTS))


def _show(passage: ChaosRun, seed: int, seconds: float, board: ResultsTable) -> None:
    sizes = " → ".join(map(str, passage.sizes))
    kinds = ", ".join(blow.kind for blow in passage.blows)
    verdict = passage.wrong or f"same{f' after {kinds}' if kinds else ''}"
    sha256 = passage.answer.sha256 if passage.answer else None
    board.add(Row(f"{passage.name}, size {sizes}", passage.wrong is None, verdict, sha256, seconds))
    if passage.wrong:
        after = f" after {kinds}" if kinds else ""
        board.wrong.append(f"chaos, --seed {seed}, {passage.name}, size {sizes}{after}: {passage.wrong}")


def _summary(blows: list[InjectedFault], runs: int, failures: int, seed: int) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for kind in (*FAULTS, "all"):
        own = [blow for blow in blows if kind in (blow.kind, "all")]
        seconds = [blow.recovery for blow in own if blow.recovery is not None]
        kinds[kind] = {
            "count": len(own),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "worst_seconds": max(seconds, default=None),
        }
    told = {"seed": seed, "runs": runs, "faults": len(blows), "failures": failures, "kinds": kinds}
    return {**told, "blows": [asdict(blow) for blow in blows]}


def _show_summary(board: ResultsTable) -> None:
    chaos = board.fields["chaos"]
    told = ", ".join(f"{chaos[name]} {name}" for name in ("faults", "runs", "failures"))
    board.say(f"\n  {told:<36} {'count':>5} {'median s':>9} {'worst s':>9}  to recover", "bold")
    for kind, told in chaos["kinds"].items():
        if not told["count"]:
            continue
        median, worst = (
            "-" if told[name] is None else f"{told[name]:.1f}"
            for name in ("median_seconds", "worst_seconds")
        )
        board.say(f"  {kind:<36} {told['count']:>5} {median:>9} {worst:>9}")
