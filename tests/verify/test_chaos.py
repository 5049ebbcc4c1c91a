"""Faults on purpose: what strikes, what is counted, and that the answer stays the same."""

import itertools
import json
import os
import subprocess
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ranks import DMNIST, environment

from distributed_mnist.errors import CheckpointError
from distributed_mnist.runs.checkpoint import decode
from distributed_mnist.verify import chaos, faults
from distributed_mnist.verify.chaos import InjectedFault
from distributed_mnist.verify.faults import FAULTS
from distributed_mnist.verify.job import RunFailedError, TrainCommand

LONG = 900.0  # seconds, for several runs one after another


def test_a_few_faults_are_of_different_kinds() -> None:
    deck = chaos._shuffled(Random(5))
    for _ in range(3):
        assert set(itertools.islice(deck, len(FAULTS))) == set(FAULTS)


def test_the_seed_decides_the_order() -> None:
    first = list(itertools.islice(chaos._shuffled(Random(5)), 30))
    assert first == list(itertools.islice(chaos._shuffled(Random(5)), 30))
    assert first != list(itertools.islice(chaos._shuffled(Random(6)), 30))


def test_summary_counts_by_kind() -> None:
    blows = [
        InjectedFault("kill", "", 1.0),
        InjectedFault("kill", "", 3.0),
        InjectedFault("kill", "", None),
        InjectedFault("stop", "", 7.0),
    ]
    told = chaos._summary(blows, runs=2, failures=0, seed=9)
    assert (told["seed"], told["runs"], told["faults"], told["failures"]) == (9, 2, 4, 0)
    assert told["kinds"]["kill"] == {"count": 3, "median_seconds": 2.0, "worst_seconds": 3.0}
    assert told["kinds"]["terminate"] == {"count": 0, "median_seconds": None, "worst_seconds": None}
    assert told["kinds"]["all"]["count"] == 4
    assert told["kinds"]["all"]["worst_seconds"] == 7.0


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> TrainCommand:
    """A short run of two processes that has ended."""
    folder = tmp_path_factory.mktemp("trial") / "run"
    with TrainCommand(folder, 2, "cpu", "--epochs", "1", "--model", "linear") as trial:
        assert trial.await_(trial.workers, "it has no workers")
        assert trial.finish() == 0, trial.last_words()
    return trial


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_never_one_that_can_be_read(
    seed: int, trial: TrainCommand, tmp_path: Path
) -> None:
    newest = max((trial.folder / "checkpoints").glob("step_*.pt"))
    copy = tmp_path / newest.name
    copy.write_bytes(newest.read_bytes())
    faults._damage(cast(Any, SimpleNamespace(rng=Random(seed))), copy)
    with pytest.raises(CheckpointError):
        decode(copy.read_bytes(), copy.name)


def test_a_run_that_ends_badly_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with TrainCommand(tmp_path / "run", 1, "cpu", "--resume", "nowhere.pt") as trial:
        assert trial.finish() == 4
        assert "nowhere.pt" in trial.last_words()


def test_what_is_under_way_ends_with_its_block(tmp_path: Path) -> None:
    with TrainCommand(tmp_path / "run", 2, "cpu", "--epochs", "1000") as trial:
        assert len(trial.await_(lambda: trial.workers()[1:], "it has no second worker")) == 1
        family = {process.pid for process in trial.family()}
        assert trial.process.pid in family
        assert os.getpid() not in family
    assert trial.family() == []
    assert not trial.running()


def test_waiting_has_an_end(trial: TrainCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mnist.verify.job.PATIENCE", 0.05)
    with pytest.raises(RunFailedError, match="the moon did not rise within 0 s"):
        trial.await_(lambda: False, "the moon did not rise")


@pytest.mark.slow
def test_a_short_soak() -> None:
    """The long one: `dmnist verify --chaos --faults 200`."""
    words = [
        "verify",
        "--nproc",
        "3",
        "--device",
        "cpu",
        "--chaos",
        "--faults",
        "4",
        "--seed",
        "3",
        "--json",
    ]
    done = subprocess.run(
        [*DMNIST, *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told["passed"]
    assert told["chaos"]["seed"] == 3
    assert told["chaos"]["faults"] == told["chaos"]["kinds"]["all"]["count"] == 4
    assert told["chaos"]["failures"] == 0
    assert "--seed 3" in done.stderr
    undisturbed = [one for one in told["runs"] if one["what"] == "a longer job, undisturbed"]
    struck = [one for one in told["runs"] if one["what"].startswith("run ")]
    assert struck
    assert {one["weights_sha256"] for one in struck} == {undisturbed[0]["weights_sha256"]}
