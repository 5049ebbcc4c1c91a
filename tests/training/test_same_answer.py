"""The promise: the weights are a function of recipe, data and seed, regardless of the number of processes
and the launcher."""

import gzip
import hashlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEST_SIZE, TRAIN_SIZE
from ranks import (
    DMNIST,
    LAUNCH,
    TORCHRUN,
    Finished,
    WarmProgram,
    dmnist,
    dmnist_ranks,
    free_port,
    run,
    train,
)
from torchrun_agents import WarmAgent

from distributed_mnist.common import random_keys

PROMISED = ("weights_sha256", "samples_sha256", "data_sha256", "test_loss", "test_accuracy", "steps")

# No batch size divides 1,100. The last batch of 1,100 in batches of 183 has 2 samples for 8 shards.
CASES = {
    "linear": "--recipe classic --epochs 3 --batch-size 96 --lr 0.01",
    "mlp, 11 shards": "--recipe classic --model mlp --epochs 2 --batch-size 183 --shards 11",
    "cnn, augmented": "--epochs 1 --batch-size 300 --shift 2 --rotate 15 --scale 0.1 --seed 5",
    "dropout": "--recipe classic --model user_models:dropout --epochs 2 --batch-size 97 --optimizer sgd",
    "fast": "--recipe fast --steps 7 --batch-size 130",
    "accurate": "--recipe accurate --steps 4 --batch-size 130",
    "bf16": "--recipe classic --model mlp --epochs 1 --batch-size 130 --precision bf16",
    "batch norm": "--recipe classic --model user_models:batch_norm --epochs 2 --batch-size 98 "
    "--average 0.3",
    "batch norm, bf16": "--recipe classic --model user_models:batch_norm --epochs 1 --batch-size 140 "
    "--shards 11 --precision bf16",
}

# One case at every size, and each of the others where ranks own unequal or many parts of the batch.
SIZES = {
    "linear": (2, 3, 4, 8),
    "mlp, 11 shards": (3, 8),
    "cnn, augmented": (2, 8),
    "dropout": (3, 4),
    "fast": (3, 8),
    "accurate": (4,),
    "bf16": (3,),
    "batch norm": (3,),
    "batch norm, bf16": (8,),
}


@pytest.fixture(scope="module")
def result(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`result(flags, nproc)` returns the result of a run with these flags; each run happens once."""

    @cache
    def run_once(flags: str, nproc: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("run") / "out"
        return train(*data_flags(digits), *flags.split(), nproc=nproc, out=out)

    return run_once


def data_flags(digits: Path) -> tuple[str, ...]:
    return ("--dataset", "idx", "--data", str(digits))


def promised(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in PROMISED}


@pytest.mark.parametrize(("case", "nproc"), [(case, nproc) for case in CASES for nproc in SIZES[case]])
def test_any_number_of_processes(result: Any, case: str, nproc: int) -> None:
    alone, together = result(CASES[case], 1), result(CASES[case], nproc)
    assert together["world_size"] == nproc
    assert promised(together) == promised(alone)


def test_another_seed_or_recipe_is_another_answer(result: Any) -> None:
    """A digest that never changes would pass every other test here."""
    runs = [result(flags, 1) for flags in CASES.values()]
    runs.append(result(CASES["linear"] + " --seed 1", 1))
    assert len({run["weights_sha256"] for run in runs}) == len(runs)
    assert len({run["samples_sha256"] for run in runs}) == len(runs)
    assert len({run["data_sha256"] for run in runs}) == 1


def samples_digest(epochs: int, batch_size: int, seed: int) -> str:
    """Compute the digest chain over the steps' sample ids from its definition."""
    chained = hashlib.sha256(b"").digest()
    for epoch in range(epochs):
        order = random_keys.permutation(TRAIN_SIZE, "order", seed, epoch)
        assert sorted(order) == list(range(TRAIN_SIZE))
        for first in range(0, TRAIN_SIZE, batch_size):
            ids = order[first : first + batch_size].astype("<i8")
            chained = hashlib.sha256(chained + ids.tobytes()).digest()
    return chained.hex()


def test_every_sample_once_an_epoch_in_the_order_of_the_keys(result: Any) -> None:
    assert result(CASES["linear"], 3)["samples_sha256"] == samples_digest(3, 96, 0)
    assert result(CASES["mlp, 11 shards"], 3)["samples_sha256"] == samples_digest(2, 183, 0)
    assert result(CASES["cnn, augmented"], 2)["samples_sha256"] == samples_digest(1, 300, 5)


def test_the_accuracy_is_that_of_every_test_image_once(result: Any, digits: Path) -> None:
    """The test recomputes the accuracy by matrix multiplication."""
    run = result(CASES["linear"], 3)
    images = np.frombuffer(
        gzip.decompress((digits / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    labels = np.frombuffer(
        gzip.decompress((digits / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
    )
    saved = torch.load(Path(run["out"]) / "checkpoints" / f"step_{run['steps']:08d}.pt", weights_only=True)
    weight, bias = (saved["model"][f"fc.{name}"].numpy().astype(np.float64) for name in ("weight", "bias"))
    pixels = (images.reshape(TEST_SIZE, 784) / 255 - saved["dataset"]["mean"]) / saved["dataset"]["std"]
    right = int(((pixels @ weight.T + bias).argmax(1) == labels).sum())
    assert run["test_images"] == TEST_SIZE
    assert run["test_accuracy"] == right / TEST_SIZE


def test_evaluate_agrees_with_the_training_it_came_from(result: Any, digits: Path) -> None:
    trained = result(CASES["cnn, augmented"], 2)
    checkpoint = Path(trained["out"]) / "checkpoints" / "best.pt"
    words = ("evaluate", checkpoint, "--data", digits, "--device", "cpu", "--json")
    alone, together = dmnist(*words).json(), dmnist(*words, "--nproc", 3).json()
    for name in (
        "weights_sha256",
        "data_sha256",
        "test_loss",
        "test_accuracy",
        "test_images",
        "samples_sha256",
    ):
        assert alone[name] == trained[name]
        assert together[name] == trained[name]


# ---- ddp: the same samples and mathematics, equal to rounding --------------------------------------------

DDP = "--recipe classic --epochs 2 --batch-size 96 --lr 0.01 --sync ddp"


def weights(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = Path(run["out"]) / "checkpoints" / f"step_{run['steps']:08d}.pt"
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("more", "nproc"),
    [("", 1), (" --micro-batch 20", 2), (" --model user_models:dropout", 3), ("", 4)],
)
def test_ddp_is_the_tree_to_rounding(result: Any, more: str, nproc: int) -> None:
    tree = result((DDP + more).replace("--sync ddp", "").replace("--micro-batch 20", ""), 1)
    ddp = result(DDP + more, nproc)
    assert ddp["sync"] == "ddp"
    for name in ("samples_sha256", "data_sha256", "steps", "test_images"):
        assert ddp[name] == tree[name]
    assert ddp["test_loss"] == pytest.approx(tree["test_loss"], rel=1e-3)
    for name, value in weights(tree).items():
        torch.testing.assert_close(weights(ddp)[name], value, rtol=1e-3, atol=1e-4)


# ---- Started by others -----------------------------------------------------------------------------------


def flags_for(digits: Path, out: Path) -> list[str]:
    return [
        "train",
        "--device",
        "cpu",
        *data_flags(digits),
        *CASES["linear"].split(),
        "--out",
        str(out),
        "--json",
    ]


def only_rank_zero_spoke(ends: list[Finished]) -> dict[str, Any]:
    assert [end.code for end in ends] == [0] * len(ends), ends
    assert [(end.stdout, end.stderr) for end in ends[1:]] == [("", "")] * (len(ends) - 1)
    return ends[0].json()


@pytest.mark.parametrize(
    ("launcher", "program", "nproc"),
    [((*TORCHRUN, "--standalone"), DMNIST, 3), (LAUNCH, ("-m", "distributed_mnist"), 2)],
    ids=["torchrun", "torch.distributed.launch"],
)
def test_torchs_launchers(
    launcher: tuple[str, ...],
    program: tuple[str, ...],
    nproc: int,
    result: Any,
    digits: Path,
    tmp_path: Path,
) -> None:
    """With fresh processes: documents/test_documented_commands.py and cli/test_original_script.py. Our own
    launcher as a fresh program: launcher/test_restart.py."""
    group = (f"--nproc-per-node={nproc}", f"--master-port={free_port()}")
    with WarmAgent([*launcher, *group, *program, *flags_for(digits, tmp_path / "out")]) as agent:
        ended = agent.finish().json()
    assert ended["world_size"] == nproc
    assert promised(ended) == promised(result(CASES["linear"], 1))


def test_slurm(result: Any, digits: Path, tmp_path: Path) -> None:
    ranks = [
        {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NUM_TASKS": "3",
            "SLURM_STEP_TASKS_PER_NODE": "3",
            "SLURM_STEP_NODELIST": "node7",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
        for rank in range(3)
    ]
    ended = only_rank_zero_spoke(dmnist_ranks(ranks, *flags_for(digits, tmp_path / "out")))
    assert ended["world_size"] == 3
    assert promised(ended) == promised(result(CASES["linear"], 1))


@pytest.mark.parametrize("kind", ["Open MPI", "MPICH"])
def test_mpi(result: Any, digits: Path, tmp_path: Path, kind: str) -> None:
    names = {
        "Open MPI": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        "MPICH": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    }[kind]
    job = {"PMIX_NAMESPACE": f"test-{os.getpid()}"} if kind == "Open MPI" else {}
    ranks = [{**dict(zip(names, [str(rank), "2"] * 2, strict=True)), **job} for rank in range(2)]
    ended = only_rank_zero_spoke(dmnist_ranks(ranks, *flags_for(digits, tmp_path / "out")))
    assert ended["world_size"] == 2
    assert promised(ended) == promised(result(CASES["linear"], 1))


def test_variables_set_by_hand_without_a_local_rank(result: Any, digits: Path, tmp_path: Path) -> None:
    """Kubeflow does this: there is one process per pod, and local ranks are not set."""
    port = str(free_port())
    ranks = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for rank in range(2)
    ]
    ended = only_rank_zero_spoke(dmnist_ranks(ranks, *flags_for(digits, tmp_path / "out")))
    assert ended["world_size"] == 2
    assert promised(ended) == promised(result(CASES["linear"], 1))


def test_as_a_module(tmp_path: Path) -> None:
    assert "train" in run([sys.executable, "-m", "distributed_mnist", "--help"], cwd=tmp_path).stdout


def test_a_rank_of_another_job_is_turned_away(digits: Path, tmp_path: Path) -> None:
    """It uses the same MASTER_PORT. It ends at once and says why; the first job goes on undisturbed."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    words = ["train", "--device", "cpu", *data_flags(digits), "--recipe", "classic", "--steps", "2"]
    command = (*DMNIST, *words, "--out", tmp_path / "a")

    def start(rank: int, *flags: object) -> WarmProgram:
        return WarmProgram((*command, *flags), cwd=tmp_path, **place, RANK=str(rank), LOCAL_RANK="0")

    with start(0) as first:
        for flags in (["--out", tmp_path / "b"], ["--lr", "0.5"], ["--eval-every", "7"]):
            with start(1, *flags) as other:
                ended = other.finish()
            assert ended.code == 2, ended
            assert "dmnist: rank 1: rank 0 (pid " in ended.stderr
            assert f" belongs to another job: {flags[0]} " in ended.stderr
        with start(1) as second:
            ended = first.finish()
            assert second.finish().code == 0
    assert ended.code == 0, ended
    named = [
        line for line in ended.stderr.splitlines() if "belongs to another job and was turned away" in line
    ]
    assert len(named) == 3
    assert named[0].startswith("dmnist: rank 1 (pid ")
    assert (tmp_path / "a" / "result.json").exists()
    assert not (tmp_path / "b").exists()
