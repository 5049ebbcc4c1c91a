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
"""Steps with as many samples before the one that is captured. They make the optimizer's state, and the
first of all lets libraries set themselves up."""


class CapturedStep:
    """Takes steps like `TrainStep`. It captures one with each number of samples, and repeats it.

    Only the last batch of an epoch has another number. If one cannot be captured, all are taken as they are
    written from then on, and a notice says why.
    """

    def __init__(self, step: TrainStep, make_graph: Callable[[], DeviceGraph]) -> None:
        self._step, self._make_graph = step, make_graph
        self._times: dict[int, int] = {}
        """How many steps there were, by their number of samples."""
        self._captured: dict[int, _Captured] = {}
        self._failed = False

    def __call__(self, step: int) -> None:
        """Take step number `step`."""
        self._step.begin(step)
        size = self._step.context.batches.size(step)
        self._times[size] = self._times.get(size, 0) + 1
        if size not in self._captured and self._worth_capturing(size):
            self._captured[size] = _Captured(self._step.ledger.new_records())
        if size in self._captured:
            self._take(self._captured[size], step)
        else:
            self._step.rest(step)
        if self._failed:
            self._captured.clear()

    def _worth_capturing(self, size: int) -> bool:
        return (
            not self._failed
            and self._times[size] > _STEPS_BEFORE_CAPTURE
            and self._step.context.gradients.can_be_captured()
        )

    def _take(self, captured: "_Captured", step: int) -> None:
        """Take the rest of a step: what is captured by its graphs, what is not by capturing it first."""
        ledger, batches = self._step.ledger, self._step.context.batches
        if captured.graphs:  # otherwise the step itself notes its samples
            shards = self._step.context.gradients.part(batches.shard_sizes(step))
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
    """The graphs of steps with one number of samples: one for a single rank, or one before the exchange and
    one after.

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
    problem = _why_not(world, recipe, options, draws_from)
    return problem is None, [f"steps are not captured as graphs: {problem}"] if problem else []


def _why_not(world: World, recipe: Recipe, options: Run, draws_from: Sequence[str]) -> str | None:
    if world.size > 1 and recipe.precision == "exact" and options.balance == "auto":
        return "with --balance auto the parts of a batch change, and measured times must be comparable"
    if code := recipe.code():
        field, name = next(iter(code.items()))
        return f"{flag(field)} {name} is your own, and checked in every step"
    if draws_from:
        return f"--model {recipe.model} draws random numbers, by a key that differs from step to step"
    return None
