"""Work that a device records once and then repeats with one launch: CUDA graphs."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


class DeviceGraph(Protocol):
    """Records what a function lets the device compute, and repeats it on the same tensors."""

    def capture(self, function: Callable[[], object]) -> None:
        """Record the function's work on the device, without doing it.

        All tensors that it makes stay where they are, and what it reads must stay there too. Raises
        `RuntimeError` if the function does what cannot be recorded, such as a copy to the CPU.
        """
        ...

    def replay(self) -> None:
        """Do the recorded work again. Nothing of the function runs on the CPU."""
        ...


class CudaGraph:
    """A `DeviceGraph` on a CUDA device; see "CUDA semantics" in torch's documentation."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], object]) -> None:
        """Record the function's work; see `DeviceGraph`."""
        current, stream = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _no_garbage_collection():
            # Other threads may use the device meanwhile: one writes checkpoints, and NCCL has its own.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        current.wait_stream(stream)

    def replay(self) -> None:
        """Do the recorded work again; see `DeviceGraph`."""
        self._graph.replay()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream in which all graphs are captured.

    For each stream torch keeps workspaces of cuBLAS for good, 32 MiB for each thread that uses it.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect nothing in this context: releasing some of CUDA's objects would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def graphs_on(device: torch.device) -> Callable[[], DeviceGraph] | None:
    """Return what makes graphs for this device; None if it has none."""
    return CudaGraph if device.type == "cuda" else None
