"""`dmnist verify` inside a world that torchrun, srun or mpirun has started: each process trains by itself
first, so that whoever computes differently is found; then all train together."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree

from rich.console import Console

from ..common.placement import ALONE
from ..config import Recipe
from ..data import prefetch
from ..distributed.membership import Peer
from ..distributed.world import World
from ..errors import TrainingError
from ..launcher.signals import StopSignals
from ..training import run as job
from .compare import Answer, Difference, compare, read_answer
from .job import options, recipe
from .known_answers import Platform, say_known, this_platform
from .results_table import ResultsTable, Row

_ALONE_SECONDS = 900.0  # that one may train by itself while others, on faster hosts, have done so


@dataclass(frozen=True)
class SoloResult:
    """What a rank came to by itself."""

    peer: Peer
    platform: Platform
    answer: Answer
    seconds: float
    kept: str
    """The folder of its run, on its host."""


def run(world: World, board: ResultsTable, signals: StopSignals) -> None:
    """Verify a world, all its ranks together. Raises `VerificationError` on all of them alike."""
    asked = recipe_for(world.size)
    with ExitStack() as places:
        folder = world.on_every_rank(lambda: places.enter_context(board.workplace()))
        testimonies = alone(world, asked, folder, signals)
        reference = show_alone(testimonies, board)
        mine = testimonies[world.rank]
        if not board.wrong:
            together(world, asked, reference.answer, folder, board, signals)
        elif mine is not reference and mine.answer.sha256 == reference.answer.sha256:
            rmtree(folder, ignore_errors=True)  # nothing to be found out there
        if asked == recipe():
            say_known(reference.answer.result, reference.platform, board)
        else:
            board.say(
                f"\nknown     answers are for {recipe().shards} shards; this world needs {asked.shards}"
            )
    board.close()


def recipe_for(size: int) -> Recipe:
    """The job's recipe; for larger worlds with shards enough, which is another answer."""
    usual = recipe()
    return usual if size <= usual.shards else usual.replace(shards=2 ** (size - 1).bit_length())


def alone(world: World, asked: Recipe, folder: Path, signals: StopSignals) -> list[SoloResult]:
    """Everybody's testimony, by rank."""
    world.status.enter("verifying alone", patience=_ALONE_SECONDS)

    def testify() -> SoloResult:
        began = time.monotonic()
        out = folder / "alone"
        by_itself = World(ALONE, world.device, "none")
        _train(by_itself, asked, out, signals)
        here = this_platform(world.device)
        return SoloResult(
            world.peers[world.rank], here, read_answer(out), time.monotonic() - began, str(out)
        )

    mine = world.on_every_rank(testify)
    return [world.broadcast_object(mine, src=rank) for rank in range(world.size)]


def show_alone(testimonies: Sequence[SoloResult], board: ResultsTable) -> SoloResult:
    """One that has the answer of most; whoever has another goes on the board as wrong."""
    counts = Counter(testimony.answer.sha256 for testimony in testimonies)
    # Among equals rank 0's, the first that was counted.
    most = counts.most_common(1)[0][0]
    reference = next(testimony for testimony in testimonies if testimony.answer.sha256 == most)
    board.head("each process alone")
    for one in testimonies:
        difference = compare(reference.answer, one.answer)
        verdict = "reference" if one is reference else str(difference or "same")
        board.add(Row(str(one.peer), difference is None, verdict, one.answer.sha256, one.seconds))
        if difference is not None:
            board.wrong.append(_accusation(one, reference, counts[most], len(testimonies), difference))
    return reference


def _accusation(
    one: SoloResult, reference: SoloResult, agreeing: int, size: int, difference: Difference
) -> str:
    whom = f"{agreeing} of {size}" if agreeing > 1 else str(reference.peer)
    there, here = asdict(one.platform), asdict(reference.platform)
    others = [f"{name} {there[name]}, not {here[name]}" for name in there if there[name] != here[name]]
    other = f"; it is another platform ({'; '.join(others)})" if others else ""
    kept = f"kept: {one.kept} and {reference.kept}"
    return f"{one.peer} computes differently from {whom}: {difference}{other} ({kept})"


def together(
    world: World, asked: Recipe, reference: Answer, folder: Path, board: ResultsTable, signals: StopSignals
) -> None:
    """One run of the whole world, compared with what its members came to by themselves."""
    board.head("all together")
    name = f"{world.size} process{'es' if world.size > 1 else ''}"
    out = Path(world.on_rank_zero(lambda: str(folder / "together")))
    began, answer = time.monotonic(), None
    try:
        _train(world, asked, out, signals)
        answer = world.on_rank_zero(lambda: read_answer(out))
        wrong = compare(reference, answer)
    except TrainingError as error:  # the ranks compare their weights at every checkpoint
        wrong = error
    verdict = str(wrong or "same")
    board.add(Row(name, not wrong, verdict, answer and answer.sha256, time.monotonic() - began))
    if wrong:
        board.wrong.append(f"{name} together, against one alone: {wrong}")
    elif world.rank != 0 and out.parent != folder:
        rmtree(out.parent, ignore_errors=True)  # a host without rank 0's folder kept a copy at its place


def _train(world: World, asked: Recipe, out: Path, signals: StopSignals) -> None:
    chosen = options(out=out, checkpoint_every="1 epoch")
    job.run(
        world,
        asked,
        chosen,
        title="verify",
        console=Console(quiet=True),
        signals=signals,
        read=partial(prefetch.read, chosen, Console(quiet=True)),
    )
