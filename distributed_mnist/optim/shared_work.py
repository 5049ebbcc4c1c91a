"""Share work that all ranks would do alike: each rank does a part of it, and all get all results.

Every rank takes the same optimizer step. Most steps take less time than a message does, but Muon's products
of matrices take as long at any number of ranks. With many ranks they are a large part of a step.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.digest import digest
from ..distributed.world import World
from ..errors import TrainingError

Shapes = tuple[tuple[int, int], ...]
"""The rows and columns of matrices."""
MapMatrices = Callable[..., list[Tensor]]
"""`map_matrices(function, matrices, ...)` is `list(map(function, matrices, ...))`. The function returns a
tensor of the shape and dtype of its matrix."""

# They only decide whether to share. The link's are those of `gradients.cost_model.LOOPBACK`.
_OPERATIONS_PER_SECOND = 5e10
_LATENCY, _BYTES_PER_SECOND = 60e-6, 3e9
_CHECK_EVERY = 64  # calls; a check costs one more matrix on each rank


def map_here(function: Callable[..., Tensor], *arguments: Sequence[Tensor]) -> list[Tensor]:
    """Apply the function to all matrices on this rank; see `MapMatrices`."""
    return list(map(function, *arguments))


class SharedWork:
    """`MapMatrices` for functions that take as long as Newton-Schulz iteration. Every rank must call it.

    A tensor of more than two dimensions counts as the matrix `(first dimension, all others)`.

    The results have the same bits as those of `map_here`, because the ranks of a run compute alike. A rank
    that does not would give all ranks the same wrong result. So from time to time each rank repeats a
    matrix of the next rank. If one gets another result, all raise `TrainingError`.
    """

    def __init__(self, world: World) -> None:
        self._world, self._calls = world, 0

    def __call__(self, function: Callable[..., Tensor], *arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the function's results."""
        rank, size, calls = self._world.rank, self._world.size, list(zip(*arguments, strict=True))
        owners = share(tuple((len(call[0]), call[0].shape[1:].numel()) for call in calls), size)
        if owners is None:
            return map_here(function, *arguments)
        # A rank's own results lie first, then those of the next rank, and so on.
        distances = [(owner - rank) % size for owner in owners]
        order = sorted(range(len(calls)), key=lambda i: distances[i])
        lengths = [calls[i][0].numel() for i in order]
        numbers = calls[0][0].new_empty(sum(lengths))
        results = {
            i: piece.view_as(calls[i][0]) for i, piece in zip(order, numbers.split(lengths), strict=True)
        }
        for i in (i for i in order if distances[i] == 0):
            results[i].copy_(function(*calls[i]))
        ends = [sum(results[i].numel() for i in order if distances[i] < d) for d in range(size + 1)]
        self._gather(numbers, ends)
        if self._calls % _CHECK_EVERY == 0:
            i = next((i for i in order if distances[i] == 1), None)
            self._require(i is None or digest(function(*calls[i])) == digest(results[i]))
        self._calls += 1
        return [results[i] for i in range(len(calls))]

    def _gather(self, numbers: Tensor, ends: Sequence[int]) -> None:
        """Fill in the other ranks' numbers: those of the rank `d` after this one are before `ends[d + 1]`.

        In each round the number of ranks whose numbers are present doubles, as in an all-gather.
        """
        rank, size, present = self._world.rank, self._world.size, 1
        while present < size:
            count = min(present, size - present)
            self._world.send_recv(
                {(rank - present) % size: numbers[: ends[count]]},
                {(rank + present) % size: numbers[ends[present] : ends[present + count]]},
            )
            present += count

    def _require(self, same: bool) -> None:
        found = self._world.all_gather(torch.tensor(same)).tolist()
        if not all(found):
            rank = found.index(False)
            raise TrainingError(
                f"rank {rank} and rank {(rank + 1) % self._world.size} compute different steps of the "
                "optimizer from the same gradients: one of these hosts computes wrongly"
            )


@functools.lru_cache(maxsize=64)
def share(shapes: Shapes, size: int) -> list[int] | None:
    """Return the rank for each matrix, or None if messages would take longer than what they save.

    The largest matrix comes first; each goes to the rank that has least to do.
    """
    costs = [3 * (4 * min(shape) * shape[0] * shape[1] + 2 * min(shape) ** 3) for shape in shapes]
    loads, owners = [0] * size, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    saved = (sum(costs) - max(loads)) / _OPERATIONS_PER_SECOND
    nbytes = 4 * sum(rows * columns for rows, columns in shapes)
    messages = (size - 1).bit_length() * (_LATENCY + nbytes / _BYTES_PER_SECOND)
    return owners if saved > messages else None
