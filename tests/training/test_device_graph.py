"""The calls of CUDA that a capture makes, on stand-ins."""

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_mnist.training.step import device_graph
from distributed_mnist.training.step.device_graph import CudaGraph, graphs_on


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls so far, in order."""
    made: list[str] = []

    class Graph:
        def capture_begin(self, *, capture_error_mode: str) -> None:
            made.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            made.append("end")

        def replay(self) -> None:
            made.append("replay")

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: made.append(f"{name} after {other.name}")
        )

    @contextlib.contextmanager
    def inside(one: Any) -> Iterator[None]:
        made.append(f"into {one.name}")
        yield
        made.append(f"out of {one.name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("current"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device_graph, "_capture_stream", lambda device: stream("own"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    return made


def test_a_capture_has_a_stream_of_its_own_and_no_garbage_collection(calls: list[str]) -> None:
    graph = CudaGraph()
    graph.capture(lambda: calls.append(f"work, garbage collection {gc.isenabled()}"))
    graph.replay()
    work = ["begin thread_local", "work, garbage collection False", "end"]
    expected = ["own after current", "into own", *work, "out of own", "current after own", "replay"]
    assert calls == expected
    assert gc.isenabled()


def test_a_capture_that_fails_is_ended(calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraph().capture(lambda: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
    assert calls[-2:] == ["begin thread_local", "end"]
    assert gc.isenabled()


def test_all_captures_on_a_device_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream would have a workspace of cuBLAS."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    first, second = (device_graph._capture_stream(-1) for _ in range(2))
    assert first is second is not device_graph._capture_stream(-2)


def test_only_cuda_devices_have_graphs() -> None:
    assert graphs_on(torch.device("cuda", 1)) is CudaGraph
    assert graphs_on(torch.device("cpu")) is graphs_on(torch.device("mps")) is None
