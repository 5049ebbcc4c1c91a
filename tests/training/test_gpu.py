"""Test the promise on an accelerator, and moves between it and the CPU. Run with `make test-gpu`.

`conftest` hides GPUs from all other tests, and from these in `make test`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import user_models
from ranks import DMNIST, Finished, Program, events, free_port, run

COUNT = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
HAS_GRAPHS = torch.cuda.is_available()
EAGER = ("--cuda-graphs", "off")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT == 0, reason="torch finds no accelerator here, or pytest ran without -m gpu"),
]


def dmnist(*arguments: object) -> Finished:
    return run([*DMNIST, *arguments])


def trained(digits: Path, out: Path, *more: object, nproc: int = 1, device: str = "auto") -> dict[str, Any]:
    return dmnist(*words(digits, out, device), "--nproc", nproc, *more).json()


def words(digits: Path, out: Path, device: str) -> list[object]:
    options = ["--dataset", "idx", "--data", digits, "--epochs", "2", "--json"]
    return ["train", *options, "--device", device, "--out", out]


def trained_by_a_group(digits: Path, out: Path, devices: list[str], *more: object) -> dict[str, Any]:
    """Train with one rank on each of these devices."""
    where = {"WORLD_SIZE": str(len(devices)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as running:
        programs = [
            running.enter_context(
                Program([*DMNIST, *words(digits, out, device), *more], cwd=None, RANK=str(rank), **where)
            )
            for rank, device in enumerate(devices)
        ]
        ended, *others = [program.finish() for program in programs]
    assert {other.code for other in others} == {0}, others
    return ended.json()


def captured(out: Path) -> bool:
    """Whether a run repeated whole steps with one launch."""
    return any("graph" in event["seconds"] for event in events(out) if event["event"] == "steps")


@pytest.mark.parametrize("recipe", ["classic", "default", "fast"])
def test_the_same_bits_every_time_with_and_without_graphs(
    recipe: str, digits: Path, tmp_path: Path
) -> None:
    options = ["--recipe", recipe]
    first, second = (trained(digits, tmp_path / name, *options) for name in ("a", "b"))
    eager = trained(digits, tmp_path / "eager", *options, *EAGER)
    assert first["device"] != "cpu"
    assert first["weights_sha256"] == second["weights_sha256"] == eager["weights_sha256"]
    assert first["test_loss"] == second["test_loss"] == eager["test_loss"]
    assert captured(tmp_path / "a") == HAS_GRAPHS
    assert not captured(tmp_path / "eager")


def test_ddp_computes_the_same_with_and_without_graphs(digits: Path, tmp_path: Path) -> None:
    options = ["--recipe", "default", "--sync", "ddp"]
    graphs, eager = (
        trained(digits, tmp_path / "a", *options),
        trained(digits, tmp_path / "b", *options, *EAGER),
    )
    assert graphs["samples_sha256"] == eager["samples_sha256"]
    assert abs(graphs["test_accuracy"] - eager["test_accuracy"]) < 0.1
    assert captured(tmp_path / "a") == HAS_GRAPHS


def test_a_model_that_is_not_captured_says_so(digits: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(user_models.__file__).parent), os.environ.get("PYTHONPATH", "")])
    model = ["--recipe", "classic", "--model", "user_models:dropout"]
    ended = run([*DMNIST, *words(digits, tmp_path / "run", "auto"), *model], PYTHONPATH=path)
    assert ended.json()["device"] != "cpu"
    notice = "steps are not captured as graphs: --model user_models:dropout is your own"
    assert (notice in ended.stderr) == HAS_GRAPHS
    assert not captured(tmp_path / "run")


IMPORTED = """
import sys
from distributed_mnist import train
train("fast", dataset="generated", train_size=2048, test_size=64, steps=6, batch_size=512, out=sys.argv[1])
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_a_run_does_not_import_the_compiler_of_torch(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", IMPORTED, tmp_path / "run"])
    assert (ended.code, ended.stdout) == (0, "[]\n"), ended
    assert captured(tmp_path / "run") == HAS_GRAPHS


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


@pytest.mark.parametrize("recipe", ["classic", "fast"])
def test_exact_arithmetic_has_one_hash_on_all_devices(recipe: str, digits: Path, tmp_path: Path) -> None:
    options = ["--recipe", recipe, "--precision", "exact", "--steps", "6"]
    on_cpu, there = (
        trained(digits, tmp_path / device, *options, device=device) for device in ("cpu", "auto")
    )
    mixed = trained_by_a_group(
        digits, tmp_path / "mixed", ["cpu", "auto", "cpu"], *options, "--balance", "auto"
    )
    assert mixed["device"] == f"2 on cpu, 1 on {there['device']}"
    eager = trained(digits, tmp_path / "eager", *options, *EAGER)
    assert captured(tmp_path / "auto") == HAS_GRAPHS
    for result in (there, mixed, eager):
        assert result["weights_sha256"] == on_cpu["weights_sha256"]
        assert result["test_loss"] == on_cpu["test_loss"]


def test_an_exact_run_moves_between_devices(digits: Path, tmp_path: Path) -> None:
    options = ["--recipe", "classic", "--precision", "exact"]  # whose rate does not look ahead
    trained(digits, tmp_path / "run", *options, "--steps", "3", device="cpu")
    trained(digits, tmp_path / "run", *options, "--steps", "6", "--resume", "auto")
    back = trained(digits, tmp_path / "run", *options, "--resume", "auto", device="cpu")
    whole = trained(digits, tmp_path / "whole", *options, device="cpu")
    assert back["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("more", [["--precision", "exact"], ["--sync", "tree"], ["--sync", "ddp"]])
def test_processes_share_a_device(more: list[str], digits: Path, tmp_path: Path) -> None:
    options = ["--recipe", "classic", *more]
    alone = trained(digits, tmp_path / "alone", *options)
    shared = trained(digits, tmp_path / "shared", *options, "--oversubscribe", nproc=COUNT + 1)
    assert shared["samples_sha256"] == alone["samples_sha256"]
    if more != ["--sync", "ddp"]:  # whose rounding depends on the number of processes
        assert shared["weights_sha256"] == alone["weights_sha256"]


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


def test_it_computes_the_known_answer() -> None:
    ended = dmnist("verify", "--json")
    assert ended.json()["passed"], ended


@pytest.mark.skipif(not HAS_GRAPHS, reason="its DistributedDataParallel needs CUDA and NCCL")
def test_the_plain_loop_of_bench_runs_on_it(digits: Path) -> None:
    words = ["--dataset", "idx", "--data", digits, "--model", "cnn", "--device", "cuda", "--epochs", "2"]
    ended = run([sys.executable, "-m", "distributed_mnist.bench.baseline", *words])
    measured = ended.json()
    assert measured["images_per_second"] > 0
    assert len(measured["epochs"]) == 2
