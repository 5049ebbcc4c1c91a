"""Steps that are captured as graphs: the device repeats a whole step with one launch.

A step of a small network is hundreds of kernels of a few microseconds each, and it takes longer to launch
them than to compute them. What is captured is `TrainStep`, as it is written, so the bits are the same.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ...config import Recipe, Run, flag
from ...distributed.world import World
from ..ledger import Ledger
from ..state import State, TrainingContext, report
from ..sync_points import PhaseTimer
from .device_graph import DeviceGraph, graphs_on
from .train_step import TrainStep

_STEPS_BEFORE_CAPTURE = 2
"""Steps of a kind before the one that is captured. They make the optimizer's state, and the first of all
lets libraries set themselves up."""

_MOST_GRAPHS = 4
"""Kinds of steps whose graphs are kept: their memory is used for nothing else."""

Kind = tuple[int, range]
"""Steps with the same number of samples, and the same part of them for this rank, have the same graphs."""


class CapturedStep:
    """Takes steps like `TrainStep`. It captures and repeats those of kinds that come again and again.

    If one cannot be captured, all are taken as they are written from then on, and a notice says why.
    """

    def __init__(self, step: TrainStep, make_graph: Callable[[], DeviceGraph]) -> None:
        self._step, self._make_graph = step, make_graph
        self._times: dict[Kind, int] = {}
        self._captured: dict[Kind, _Captured] = {}
        self._failed = False

    def __call__(self, step: int) -> None:
        """Take step number `step`."""
        self._step.begin(step)
        kind = self._kind(step)
        self._times[kind] = self._times.get(kind, 0) + 1
        if kind not in self._captured and not self._worth_capturing(kind):
            self._step.rest(step)
            return
        if kind not in self._captured:
            if len(self._captured) == _MOST_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            self._captured[kind] = _Captured(self._step.ledger.new_records())
        self._take(self._captured[kind], step, kind[1])
        if self._failed:
            self._captured.clear()

    def _kind(self, step: int) -> Kind:
        sizes = self._step.context.batches.shard_sizes(step)
        return self._step.context.batches.size(step), self._step.context.gradients.part(sizes)

    def _worth_capturing(self, kind: Kind) -> bool:
        return (
            not self._failed
            and self._times[kind] > _STEPS_BEFORE_CAPTURE
            and self._step.context.gradients.can_be_captured()
        )

    def _take(self, captured: "_Captured", step: int, shards: range) -> None:
        """Take the rest of a step: what is captured by its graphs, what is not by capturing it first.

        `shards` are this rank's.
        """
        ledger, batches = self._step.ledger, self._step.context.batches
        if captured.graphs:  # otherwise the step itself notes its samples
            ledger.record_ids(*batches.ids(step, shards))
        with ledger.records_in(captured.records):
            if self._step.context.world.size == 1:
                self._run(captured, 0, partial(self._step.rest, step))
            else:
                self._run(captured, 0, partial(self._step.compute_part, step))
                self._step.exchange()
                self._run(captured, 1, partial(self._step.update, step))

    def _run(self, captured: "_Captured", index: int, function: Callable[[], None]) -> None:
        """Let the device do a function's work, by graph number `index`, or by calling the function."""
        if len(captured.graphs) == index and not self._failed:
            graph = self._make_graph()
            try:
                graph.capture(function)
                captured.graphs.append(graph)
            except RuntimeError as error:
                self._failed = True
                if index == 0:  # the function is called again, and records its samples again
                    self._step.ledger.take_back(0)
                problem = str(error).strip().partition("\n")[0]
                report(self._step.context, "notice", text=f"steps are not captured as graphs: {problem}")
        if len(captured.graphs) > index:
            with self._step.timer.phase("graph"):
                captured.graphs[index].replay()
        else:
            function()


def make_step(
    state: State, context: TrainingContext, ledger: Ledger, timer: PhaseTimer
) -> Callable[[int], None]:
    """Return the function that takes a step, given its number. It is captured if the context says so."""
    step = TrainStep(state, context, ledger, timer)
    make_graph = graphs_on(context.world.device)
    return CapturedStep(step, make_graph) if context.captured and make_graph else step


class _Captured:
    """The graphs of steps of one kind: one for a single rank, or one before the exchange and one after.

    `records` is where the graph records losses, see `Ledger.records_in`.
    """

    def __init__(self, records: Tensor) -> None:
        self.graphs: list[DeviceGraph] = []
        self.records = records


def can_capture(
    world: World, recipe: Recipe, options: Run, draws_from: Sequence[str]
) -> tuple[bool, list[str]]:
    """Return whether to capture the steps of a run, and a notice if the device could and they cannot be.

    `draws_from` are the global generators from which the model draws random numbers.
    """
    if graphs_on(world.device) is None or options.cuda_graphs == "off":
        return False, []
    problem = _why_not(recipe, draws_from)
    if world.size > 1 and recipe.precision == "exact" and options.balance == "auto":
        problem = "with --balance auto the parts of a batch change, and measured times must be comparable"
    return problem is None, [f"steps are not captured as graphs: {problem}"] if problem else []


def _why_not(recipe: Recipe, draws_from: Sequence[str]) -> str | None:
    if code := recipe.code():
        field, name = next(iter(code.items()))
        return f"{flag(field)} {name} is your own, and checked in every step"
    if draws_from:
        return f"--model {recipe.model} draws random numbers, by a key that differs from step to step"
    return None
