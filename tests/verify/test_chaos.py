"""Test injected faults: which ones, what is counted, and that the answer stays the same."""

import itertools
import json
import os
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distributed_mnist.cli import main
from distributed_mnist.errors import CheckpointError, UsageError
from distributed_mnist.runs.checkpoint import decode
from distributed_mnist.runs.layout import checkpoints_in
from distributed_mnist.verify.tree import chaos, faults, training_job
from distributed_mnist.verify.tree.chaos import InjectedFault
from distributed_mnist.verify.tree.faults import FAULTS
from distributed_mnist.verify.tree.training_job import RunFailedError, TrainCommand


def test_every_kind_of_fault_comes_once_per_round() -> None:
    kinds = chaos._fault_kinds(Random(5))
    for _ in range(3):
        assert set(itertools.islice(kinds, len(FAULTS))) == set(FAULTS)


def test_the_largest_size() -> None:
    assert chaos.largest_size(3, "cpu") == 3
    assert chaos.largest_size(None, "cpu") in (2, 3, 4)
    with pytest.raises(UsageError, match=r"^--nproc must be between 1 and 8, not 9$"):
        chaos.largest_size(9, "cpu")


def test_the_seed_decides_the_order() -> None:
    first = list(itertools.islice(chaos._fault_kinds(Random(5)), 30))
    assert first == list(itertools.islice(chaos._fault_kinds(Random(5)), 30))
    assert first != list(itertools.islice(chaos._fault_kinds(Random(6)), 30))


def test_summary_counts_by_kind() -> None:
    injected = [
        InjectedFault("kill", "", 1.0),
        InjectedFault("kill", "", 3.0),
        InjectedFault("kill", "", None),
        InjectedFault("stop", "", 7.0),
    ]
    summary = chaos._summary(injected, runs=2, failures=0, seed=9)
    assert (summary["seed"], summary["runs"], summary["faults"], summary["failures"]) == (9, 2, 4, 0)
    assert summary["kinds"]["kill"] == {"count": 3, "median_seconds": 2.0, "worst_seconds": 3.0}
    assert summary["kinds"]["terminate"] == {"count": 0, "median_seconds": None, "worst_seconds": None}
    assert summary["kinds"]["all"]["count"] == 4
    assert summary["kinds"]["all"]["worst_seconds"] == 7.0


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> TrainCommand:
    """A run of two processes that was under way, with a checkpoint, when the block was left."""
    folder = tmp_path_factory.mktemp("command") / "run"
    flags = ("--model", "linear", "--epochs", "1000", "--checkpoint-every", "0.1 seconds")
    with TrainCommand(folder, 2, "cpu", *flags) as command:
        saved = lambda: checkpoints_in(folder / "checkpoints")  # noqa: E731
        assert command.wait_for(saved, "it saved no checkpoint", poll_seconds=0.1)
        assert len(command.workers()) == 2
        pids = {process.pid for process in command.processes()}
        assert command.process.pid in pids
        assert os.getpid() not in pids
    return command


def test_leaving_the_block_ends_all_processes(command: TrainCommand) -> None:
    assert command.processes() == []
    assert not command.running()


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_cannot_be_read(seed: int, command: TrainCommand, tmp_path: Path) -> None:
    newest = checkpoints_in(command.folder / "checkpoints")[-1]
    copy = tmp_path / newest.name
    copy.write_bytes(newest.read_bytes())
    faults._damage(cast(Any, SimpleNamespace(rng=Random(seed))), copy)
    with pytest.raises(CheckpointError):
        decode(copy.read_bytes(), copy.name)


def test_a_run_that_fails_says_so_and_leaves_no_processes(tmp_path: Path) -> None:
    with TrainCommand(tmp_path / "run", 1, "cpu", "--epochs", "0") as command:
        assert command.finish() == 2
        assert "--epochs" in command.last_line()


def test_waiting_times_out(command: TrainCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mnist.verify.tree.training_job.TIMEOUT_SECONDS", 0.05)
    with pytest.raises(RunFailedError, match="it did not start within 0 s"):
        command.wait_for(lambda: False, "it did not start")


@pytest.mark.slow
def test_a_few_faults_change_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the long version run `dmnist verify --chaos --faults 200`."""
    # Less data, which have no known answer. Runs without faults are compared in test_tree.
    monkeypatch.setitem(training_job.DATA, "train_size", 1_000)
    monkeypatch.setitem(training_job.DATA, "test_size", 99)
    words = ["verify", "--nproc", "3", "--device", "cpu", "--chaos", "--faults", "2", "--seed", "3"]
    with pytest.raises(SystemExit) as end:
        main.main([*words, "--json"])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 0, stderr
    result = json.loads(stdout)
    assert result["passed"]
    assert result["chaos"]["seed"] == 3
    assert result["chaos"]["faults"] == result["chaos"]["kinds"]["all"]["count"] == 2
    assert result["chaos"]["failures"] == 0
    assert "--seed 3" in stderr
    reference, *under_faults = result["runs"]
    assert reference["what"] == "a longer job, without faults"
    assert under_faults
    assert all(run["what"].startswith("run ") for run in under_faults)
    assert {run["weights_sha256"] for run in under_faults} == {reference["weights_sha256"]}
