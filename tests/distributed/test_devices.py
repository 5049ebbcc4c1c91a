"""Which device a rank uses, on hosts with and without an accelerator."""

import os
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import ranks
import torch

from distributed_mnist.common.placement import ALONE, Placement
from distributed_mnist.distributed import devices
from distributed_mnist.distributed.devices import choose_device
from distributed_mnist.errors import LaunchError


@pytest.fixture(params=[None, "cuda", "mps"])
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """A host with one accelerator of this kind, or with none."""
    kind = request.param
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(kind is not None))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    return kind


def test_a_device_is_demanded_or_left_to_the_host(accelerator: str | None) -> None:
    assert choose_device(ALONE, "cpu") == torch.device("cpu")
    assert choose_device(ALONE, "auto").type == (accelerator or "cpu")
    for demanded in ("cuda", "mps", "xpu"):
        if demanded == accelerator:
            assert choose_device(ALONE, demanded) == torch.device(demanded, 0)
            continue
        instead = f"its accelerator is {accelerator}" if accelerator else "dmnist doctor shows the devices"
        with pytest.raises(
            LaunchError, match=f"^--device {demanded}: torch .* finds none on this host; {instead}"
        ):
            choose_device(ALONE, demanded)


def test_one_rank_of_each_host_reports_it(accelerator: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 may be on another host, which has an accelerator. It is told."""
    told: list[str] = []
    monkeypatch.setattr(devices, "tell_failure", lambda placement, error: told.append(str(error)))
    for local_rank in range(2):
        placement = Placement(rank=2 + local_rank, size=4, local_rank=local_rank, local_size=2)
        with pytest.raises(LaunchError) as caught:
            choose_device(placement, "cuda")
        assert caught.value.on_one_rank == (local_rank == 0)
        assert told.pop() == str(caught.value)


@pytest.mark.parametrize("accelerator", ["cuda"], indirect=True)
def test_only_ranks_that_are_told_to_share_a_device(accelerator: str) -> None:
    for local_rank in range(3):
        placement = Placement(
            rank=local_rank, size=3, local_rank=local_rank, local_size=3, launcher="spawned"
        )
        assert choose_device(placement, "auto", shared=True) == torch.device(accelerator, 0)
        message = (
            "^3 processes on this host but 1 CUDA device: start at most 1, or let them share it with dmnist"
        )
        with pytest.raises(LaunchError, match=f"{message} train --oversubscribe$"):
            choose_device(placement, "auto")


@pytest.mark.parametrize(("marks", "hidden"), [("not soak", True), ("gpu", False)])
def test_only_tests_of_gpus_see_them(marks: str, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=marks))
    conftest.pytest_configure(config)
    seen = "" if hidden else "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ranks.environment()["CUDA_VISIBLE_DEVICES"] == seen
