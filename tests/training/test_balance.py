"""`--balance auto`: slower ranks get smaller parts of the batch, and the weights stay the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import events, run_ranks, train
from torch import Tensor, nn

from distributed_mnist.common.placement import Placement
from distributed_mnist.data.broadcast import Data
from distributed_mnist.data.split import Split
from distributed_mnist.distributed.world import World
from distributed_mnist.gradients.exact.parts import Parts
from distributed_mnist.models.build import build
from distributed_mnist.reporting import html_report, watch
from distributed_mnist.runs.record import read
from distributed_mnist.training.evaluate import CHUNK, Evaluation, evaluate
from distributed_mnist.training.sync_points import SyncPoints

SLOW = (
    *("--recipe", "classic", "--model", "user_models:slow_on_rank_one", "--precision", "exact"),
    *("--batch-size", 96, "--epochs", 2),
)


def test_a_slow_rank_gets_fewer_images_and_the_weights_stay_the_same(digits: Path, tmp_path: Path) -> None:
    results = {}
    for name, nproc in (("off", 1), ("auto", 2), ("off", 2)):
        words = (*SLOW, "--dataset", "idx", "--data", digits, "--balance", name)
        results[name, nproc] = train(*words, nproc=nproc, out=tmp_path / f"{name}{nproc}")
    for field in ("weights_sha256", "samples_sha256", "test_loss"):
        assert len({result[field] for result in results.values()}) == 1
    even, balanced = (
        [event["ranks"]["share"] for event in events(tmp_path / name) if event["event"] == "steps"]
        for name in ("off2", "auto2")
    )
    assert all(shares == [0.5, 0.5] for shares in even)
    assert balanced[0] == [0.5, 0.5]
    assert balanced[-1][1] < 0.25
    assert watch.state(tmp_path / "auto2")["ranks"]["share"] == balanced[-1]
    title = "A rank&#39;s part of a batch, %"
    for name, shown in (("off2", False), ("auto2", True)):
        assert (title in html_report.render([read(tmp_path / name)])) is shown


def uneven_parts() -> Parts:
    parts = Parts(3, balance=90)
    for _ in range(2):
        parts.adjust([1.0, 3.0, 90.0])
    return parts


def evaluate_in_parts(world: World, uneven: bool) -> tuple[int, Any]:
    """Evaluate in parts; return how many images this rank scored in training's cut, and the result."""
    images = np.random.default_rng(0).integers(0, 256, (7 * CHUNK - 9, 28, 28), dtype=np.uint8)
    split = Split(torch.from_numpy(images), torch.zeros(len(images), dtype=torch.uint8))
    data = Data(split, split, "test", tuple("0123456789"), 0.13, 0.31, "", "")
    chunks = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build("linear", 10, seed=0)

        def forward(self, images: Tensor) -> Tensor:
            nonlocal chunks
            chunks += 1
            return self.network(images)

    parts = uneven_parts() if uneven else None
    found: Evaluation = evaluate(Counted(), data, world, "exact", parts=parts)
    return chunks - 1, (found.loss, found.confusion, found.predicted.numpy(), found.confidence.numpy())


def test_an_evaluation_follows_the_parts() -> None:
    """One chunk more is the neighbour's, repeated; a rank without a chunk also checks one of its own."""
    even, uneven = run_ranks(evaluate_in_parts, 3, False), run_ranks(evaluate_in_parts, 3, True)
    assert [chunks for chunks, _ in even] == [2, 3, 2]
    assert [chunks for chunks, _ in uneven] == [5, 2, 1]
    for _, found in (*even, *uneven):
        np.testing.assert_equal(found, even[0][1])


class Device:
    """A device with a clock of its own, on which a collective takes 3 seconds."""

    now = 0.0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Device.now

        def elapsed_time(self, later: "Device.Event") -> float:
            return 1e3 * (later.at - self.at)


class Collectives:
    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        Device.now += 3.0
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor])


def test_an_asynchronous_device_times_collectives_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: the CPU takes no time to start what it does."""
    placement = Placement(
        rank=0, size=2, local_rank=0, local_size=2, ports=(1,), launcher="test", secret=b""
    )
    world: Any = World(placement, torch.device("cpu"), "nccl")
    world._collectives = Collectives()
    world.device_clock._device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda _: Device)
    points = SyncPoints(world, 0, 100)
    world.all_reduce_sum_(torch.zeros(1))  # before the interval
    points.start()
    for _ in range(4):
        Device.now += 2.0
        world.all_reduce_sum_(torch.zeros(1))
    with world.communicating("waiting for all that was started", also_computes=True):
        Device.now += 1.0
    points.sync(4, stop=False, save=False)
    assert points.exchange_per_step == [3.0, 3.0]
    world.all_reduce_sum_(torch.zeros(1))  # a part of the sync point
    points.start()
    points.sync(5, stop=False, save=False)
    assert points.exchange_per_step == [0.0, 0.0]
