"""Whose run a folder holds: a launcher that starts a group again does not say so to its processes."""

from pathlib import Path

import pytest
import torch

from distributed_mnist.common.placement import Placement
from distributed_mnist.config import Recipe, Run
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import OutputError
from distributed_mnist.runs.checkpoint import encode
from distributed_mnist.runs.run_folder import RunFolder, open_folder


def opened(starter: str, out: Path | None = None, seed: int = 0) -> RunFolder:
    """A group of one opens its folder, leaves a checkpoint there, and dies: its lock is gone with it."""
    world = World(Placement(starter=starter), torch.device("cpu"), "none")
    folder = open_folder(world, Run(out=out), Recipe(seed=seed), "mine")
    assert folder.lock is not None
    folder.lock.release()
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / "step_00000001.pt").write_bytes(encode({}))
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("out", [None, Path("here")])
def test_the_same_launcher_goes_on(out: Path | None) -> None:
    for number in range(30):  # whatever else lies there, of whatever name
        Path(f"runs/slurm-{number}").mkdir(parents=True)
    first = opened("launcher 1", out)
    assert not first.again
    second = opened("launcher 1", out)
    assert second.again
    assert second.path == first.path
    assert second.mark != first.mark


def test_another_launcher_does_not() -> None:
    first = opened("launcher 1")
    assert not opened("launcher 2").again
    assert opened("launcher 1").path == first.path
    with pytest.raises(OutputError, match="already holds a run"):
        opened("launcher 3", first.path)


def test_one_that_starts_nothing_again_is_never_known() -> None:
    assert {opened("").again for _ in range(3)} == {False}


def test_two_runs_of_one_launcher() -> None:
    """As in a batch file that trains with one seed after the other."""
    first, second = opened("launcher", seed=0), opened("launcher", seed=1)
    assert not second.again
    assert second.path != first.path
    assert opened("launcher", seed=0).path == first.path
    with pytest.raises(OutputError, match="already holds a run"):
        opened("launcher", first.path, seed=2)
