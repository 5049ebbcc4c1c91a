"""Recognising a restarted run by its folder, because launchers do not report restarts to processes."""

from pathlib import Path

import pytest
import torch

from distributed_mnist.common.placement import Placement
from distributed_mnist.config import Recipe, Run
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import OutputError
from distributed_mnist.runs.checkpoint import encode
from distributed_mnist.runs.run_folder import RunFolder, open_folder


def opened(launcher_id: str, out: Path | None = None, seed: int = 0) -> RunFolder:
    """Open a folder as a group of one process, write a checkpoint, and release the lock, as if killed."""
    world = World(Placement(launcher_id=launcher_id), torch.device("cpu"), "none")
    folder = open_folder(world, Run(out=out), Recipe(seed=seed), "mine")
    assert folder.lock is not None
    folder.lock.release()
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / "step_00000001.pt").write_bytes(encode({}))
    return folder


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("out", [None, Path("here")])
def test_a_restart_by_the_same_launcher_is_recognised(out: Path | None) -> None:
    for number in range(30):  # other folders must not matter
        Path(f"runs/slurm-{number}").mkdir(parents=True)
    first = opened("launcher 1", out)
    assert not first.restarted
    second = opened("launcher 1", out)
    assert second.restarted
    assert second.path == first.path
    assert second.token != first.token


def test_another_launcher_starts_a_new_run() -> None:
    first = opened("launcher 1")
    assert not opened("launcher 2").restarted
    assert opened("launcher 1").path == first.path
    with pytest.raises(OutputError, match="already holds a run"):
        opened("launcher 3", first.path)


def test_a_launcher_without_restarts_is_never_recognised() -> None:
    assert {opened("").restarted for _ in range(3)} == {False}


def test_two_runs_of_one_launcher() -> None:
    """As in a batch script that trains with several seeds in turn."""
    first, second = opened("launcher", seed=0), opened("launcher", seed=1)
    assert not second.restarted
    assert second.path != first.path
    assert opened("launcher", seed=0).path == first.path
    with pytest.raises(OutputError, match="already holds a run"):
        opened("launcher", first.path, seed=2)
