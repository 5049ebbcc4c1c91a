"""Test the promise on an accelerator, and moves between it and the CPU. Run with `make test-gpu`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import DMNIST, Finished, Program

COUNT = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT == 0, reason="torch finds no accelerator here"),
]

# Other tests hide the devices from the programs that they start.
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(COUNT))))


def dmnist(*arguments: object) -> Finished:
    with Program([*DMNIST, *arguments], CUDA_VISIBLE_DEVICES=VISIBLE) as program:
        return program.finish()


def trained(digits: Path, out: Path, *more: object, nproc: int = 1, device: str = "auto") -> dict[str, Any]:
    options = ["--dataset", "idx", "--data", digits, "--epochs", "2", "--device", device, "--json"]
    ended = dmnist("train", *options, "--nproc", nproc, "--out", out, *more)
    assert ended.code == 0, ended
    return json.loads(ended.stdout)


@pytest.mark.parametrize("recipe", ["classic", "default", "fast"])
def test_the_same_bits_every_time(recipe: str, digits: Path, tmp_path: Path) -> None:
    first, second = (trained(digits, tmp_path / name, "--recipe", recipe) for name in ("a", "b"))
    assert first["device"] != "cpu"
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["test_loss"] == second["test_loss"]


@pytest.mark.skipif(COUNT < 2, reason="needs two accelerators")
def test_the_same_bits_on_several_devices(digits: Path, tmp_path: Path) -> None:
    sizes = range(1, min(COUNT, 4) + 1)
    results = [trained(digits, tmp_path / str(size), nproc=size) for size in sizes]
    assert len({result["weights_sha256"] for result in results}) == 1


@pytest.mark.skipif(COUNT < 2, reason="needs two accelerators")
def test_ddp_on_two_devices_sees_the_same_samples(digits: Path, tmp_path: Path) -> None:
    two = trained(digits, tmp_path / "two", "--sync", "ddp", nproc=2)
    one = trained(digits, tmp_path / "one", "--sync", "ddp")
    assert two["samples_sha256"] == one["samples_sha256"]
    assert abs(two["test_accuracy"] - one["test_accuracy"]) < 0.1


def test_a_stop_costs_nothing(digits: Path, tmp_path: Path) -> None:
    """Train half of the steps, which `--steps` ends, and the rest after a resume."""
    options = ["--recipe", "classic"]  # whose rate does not look ahead
    whole = trained(digits, tmp_path / "whole", *options)
    trained(digits, tmp_path / "half", *options, "--steps", "3")
    rest = trained(digits, tmp_path / "half", *options, "--resume", "auto")
    assert rest["weights_sha256"] == whole["weights_sha256"]


def test_to_the_accelerator_and_back(digits: Path, tmp_path: Path) -> None:
    """A checkpoint of one kind of device can be resumed on another, with the same samples."""
    options = ["--recipe", "classic"]
    trained(digits, tmp_path / "run", *options, "--steps", "3", device="cpu")
    there = trained(digits, tmp_path / "run", *options, "--steps", "6", "--resume", "auto")
    back = trained(digits, tmp_path / "run", *options, "--resume", "auto", device="cpu")
    whole = trained(digits, tmp_path / "cpu", *options, device="cpu")
    assert there["device"] != "cpu" == back["device"]
    assert back["samples_sha256"] == whole["samples_sha256"]
    assert abs(back["test_loss"] - whole["test_loss"]) < 1e-3


def test_scored_the_same_on_both(digits: Path, tmp_path: Path) -> None:
    result = trained(digits, tmp_path / "run")
    words = ["evaluate", tmp_path / "run" / "checkpoints" / "best.pt", "--data", digits, "--json"]
    here, on_cpu = (json.loads(dmnist(*words, "--device", device).stdout) for device in ("auto", "cpu"))
    assert here["weights_sha256"] == on_cpu["weights_sha256"]
    assert abs(here["test_accuracy"] - on_cpu["test_accuracy"]) <= 0.01
    assert here["test_images"] == result["test_images"]


def test_the_doctor_names_it() -> None:
    ended = dmnist("doctor", "--dataset", "generated", "--json")
    devices = next(one for one in json.loads(ended.stdout)["findings"] if one["name"] == "devices")
    assert devices["verdict"] == "good"
    assert not devices["value"].startswith("CPU")
