"""A `DeviceGraph` on the CPU: it records torch's operations and repeats them on the same tensors.

As with a CUDA graph, nothing of the captured function runs on the CPU when the graph is repeated. What the
function took from there, such as the number of a step, is what it was at first. A copy of a value to the
CPU cannot be recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_mnist.exact import elementary, scales
from distributed_mnist.exact.passes import weights
from distributed_mnist.training.step import captured_step, train_step

_aten: Any = torch.ops.aten
_TO_THE_CPU = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.is_nonzero.default)


class _Operation(NamedTuple):
    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    """What it has made, where the function's later operations read it."""


class RecordedGraph:
    """Records operations on the CPU."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._done = False

    def capture(self, function: Callable[[], object]) -> None:
        """Record the function's operations. It is run for this, so the first `replay` does nothing."""
        with _Recorder(self._operations):
            function()
        self._done = True

    def replay(self) -> None:
        """Repeat the operations."""
        if self._done:
            self._done = False
            return
        with torch.no_grad():
            for function, args, kwargs, results in self._operations:
                again = _tensors(function(*args, **kwargs))
                for result, value in zip(results, again, strict=True):
                    if result.data_ptr() != value.data_ptr():  # it is not a view, and not changed in place
                        result.copy_(value)


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _TO_THE_CPU:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        # A detached tensor has the same memory, and autograd leaves it alone.
        keep = lambda value: value.detach() if isinstance(value, Tensor) else value  # noqa: E731
        kept = pytree.tree_map(keep, (list(args), dict(kwargs or {}), _tensors(result)))
        self._operations.append(_Operation(func, *kept))
        return result


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


class FailingGraph(RecordedGraph):
    """Cannot record an optimizer's step."""

    def capture(self, function: Callable[[], object]) -> None:
        """Record the function's operations, or raise `RuntimeError`."""
        if getattr(function, "func", function).__name__ != "compute_part":
            raise RuntimeError("operation not permitted\nand more about it")
        super().capture(function)


def set_up(kind: type[RecordedGraph] = RecordedGraph) -> None:
    """Let the CPU of this process have graphs, for good."""
    for module in (captured_step, train_step):
        setattr(module, "graphs_on", lambda device: kind)  # noqa: B010 - for pyright
    # As on a GPU, exponents stay in tensors, and square roots are torch's: NumPy's are not recorded.
    for module in (scales, weights):
        setattr(module, "known", lambda exponents: list(exponents.unbind()))  # noqa: B010
    setattr(elementary, "np", SimpleNamespace(errstate=np.errstate, sqrt=_sqrt))  # noqa: B010


def _sqrt(x: NDArray[Any], out: NDArray[Any]) -> None:
    torch.sqrt(torch.from_numpy(x), out=torch.from_numpy(out))
