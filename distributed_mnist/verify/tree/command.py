"""Run `dmnist verify --sync tree` in a group.

First each rank trains alone, which shows which rank computes differently. Then all ranks train together.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree

from rich.console import Console

from ...common.placement import ALONE
from ...config import Recipe
from ...data import prefetch
from ...distributed.peer import Peer
from ...distributed.world import World
from ...errors import TrainingError, UsageError
from ...launcher.signals import StopSignals
from ...training import run as training_run
from ...training.platforms import require_one_kind
from ..results_table import ResultsTable
from .compare import Answer, Difference, compare, read_answer
from .known_answers import Platform, report_known_answer, this_platform
from .training_job import options, recipe

_SOLO_TIMEOUT_SECONDS = 900.0  # a slow host may train alone this long while ranks on faster hosts wait


@dataclass(frozen=True)
class SoloResult:
    """The result of a rank that trained alone."""

    peer: Peer
    platform: Platform
    answer: Answer
    seconds: float
    kept: str
    """The folder of its run, on its host."""


def run(world: World, table: ResultsTable, signals: StopSignals) -> None:
    """Verify a world. All ranks must call it. Raises `VerificationError` on all ranks or on none."""
    require_one_kind(world, "leave out --sync tree, for the exact test, or add --device cpu")
    job_recipe = recipe_for(world.size)
    with ExitStack() as stack:
        folder = world.on_every_rank(lambda: stack.enter_context(table.work_folder()))
        results = train_alone(world, job_recipe, folder, signals)
        reference = show_solo_results(results, table)
        own = results[world.rank]
        if not table.problems:
            train_together(world, job_recipe, reference.answer, folder, table, signals)
        elif own is not reference and own.answer.sha256 == reference.answer.sha256:
            rmtree(folder, ignore_errors=True)  # same weights as the reference: nothing to look into
        if job_recipe == recipe():
            report_known_answer(reference.answer.result, reference.platform, table)
        else:
            table.print_line(
                f"\nknown     answers are for {recipe().shards} shards; "
                f"this world needs {job_recipe.shards}"
            )
    table.conclude()


def recipe_for(size: int) -> Recipe:
    """Return the job's recipe. For a large world it has more shards, and so a different answer."""
    usual = recipe()
    return usual if size <= usual.shards else usual.replace(shards=2 ** (size - 1).bit_length())


def train_alone(world: World, job_recipe: Recipe, folder: Path, signals: StopSignals) -> list[SoloResult]:
    """Train on each rank by itself and return the results of all ranks, by rank."""
    world.status.enter("verifying alone", patience=_SOLO_TIMEOUT_SECONDS)

    def solo() -> SoloResult:
        began = time.monotonic()
        out = folder / "alone"
        _train(World(ALONE, world.device, "none"), job_recipe, out, signals)
        answer, platform = read_answer(out), this_platform(world.device)
        return SoloResult(world.peers[world.rank], platform, answer, time.monotonic() - began, str(out))

    own = world.on_every_rank(solo)
    return world.all_gather_object(own, SoloResult)


def show_solo_results(results: Sequence[SoloResult], table: ResultsTable) -> SoloResult:
    """Return a result with the most common answer; report each result that differs as a problem."""
    counts = Counter(result.answer.sha256 for result in results)
    # In a tie the first one counted wins, which is rank 0's.
    common_sha256, agreeing = counts.most_common(1)[0]
    reference = next(result for result in results if result.answer.sha256 == common_sha256)
    table.header("each process alone")
    for result in results:
        difference = compare(reference.answer, result.answer)
        good = "reference" if result is reference else "same"
        table.add(str(result.peer), result.answer.sha256, result.seconds, difference, good)
        if difference is not None:
            table.problems.append(_describe_mismatch(result, reference, agreeing, len(results), difference))
    return reference


def _describe_mismatch(
    result: SoloResult, reference: SoloResult, agreeing: int, size: int, difference: Difference
) -> str:
    others = f"{agreeing} of {size}" if agreeing > 1 else str(reference.peer)
    own, expected = asdict(result.platform), asdict(reference.platform)
    fields = [f"{name} {own[name]}, not {expected[name]}" for name in own if own[name] != expected[name]]
    platform = f"; it is a different platform ({'; '.join(fields)})" if fields else ""
    kept = f"kept: {result.kept} and {reference.kept}"
    return f"{result.peer} computes differently from {others}: {difference}{platform} ({kept})"


def train_together(
    world: World,
    job_recipe: Recipe,
    reference: Answer,
    folder: Path,
    table: ResultsTable,
    signals: StopSignals,
) -> None:
    """Train once with the whole world, and compare its answer with that of a single rank."""
    table.header("all together")
    name = f"{world.size} process{'es' if world.size > 1 else ''}"
    out = world.on_rank_zero(lambda: folder / "together", Path)
    began, answer = time.monotonic(), None
    try:
        _train(world, job_recipe, out, signals)
        answer = world.on_rank_zero(lambda: read_answer(out), Answer)
        problem = compare(reference, answer)
    except (TrainingError, UsageError) as error:  # the ranks compare their platforms and their weights
        problem = error
    table.add(name, answer and answer.sha256, time.monotonic() - began, problem, "same")
    if problem:
        table.problems.append(f"{name} together, against one alone: {problem}")
    elif world.rank != 0 and out.parent != folder:
        # A host that does not see rank 0's folder has kept a copy of the checkpoints at the same path.
        rmtree(out.parent, ignore_errors=True)


def _train(world: World, job_recipe: Recipe, out: Path, signals: StopSignals) -> None:
    run_options = options(out=out, checkpoint_every="1 epoch")
    training_run.run(
        world,
        job_recipe,
        run_options,
        title="verify",
        console=Console(quiet=True),
        signals=signals,
        read=partial(prefetch.read, run_options, Console(quiet=True)),
    )
