"""The original script's three commands, verbatim, on real MNIST: output lines, files and flags.

MNIST is read from the folder in DMNIST_DATA, or from `shared/mnist` next to the repository.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LAUNCH, REPOSITORY, Finished, WarmProgram, free_port, run
from torchrun_agents import WarmAgent

MNIST = Path(os.environ.get("DMNIST_DATA") or REPOSITORY.parent / "shared" / "mnist")
SCRIPT = REPOSITORY / "multi_proc_single_gpu.py"

pytestmark = pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST not found: set DMNIST_DATA to its folder")

# "Epoch: 0/1, train loss: 0.481228, train acc: 87.40%, test loss: 0.303561, test acc: 91.63%."
LINE = re.compile(
    r"Epoch: (\d+)/(\d+), train loss: (\d+\.\d{6}), train acc: (\d+\.\d\d)%, "
    r"test loss: (\d+\.\d{6}), test acc: (\d+\.\d\d)%\."
)
SCORE = re.compile(r"test loss: (\d+\.\d{6}), test acc: (\d+\.\d\d)%\.")


def epoch_lines(ended: Finished) -> list[re.Match[str]]:
    """The lines about epochs, all in the exact format."""
    assert ended.code == 0, ended
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "Epoch:" in line]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [match for match in matches if match]


def saved(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def script(*flags: object, cwd: Path) -> Finished:
    """Run the script with one process, warm. `spawned` is a fresh program."""
    with WarmProgram([SCRIPT, *flags], cwd=cwd) as program:
        return program.finish()


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The first command: `torch.distributed.launch` with two processes and all flags of that command."""
    folder = tmp_path_factory.mktemp("launched")
    launch = [*LAUNCH, "--nproc_per_node=2", f"--master_port={free_port()}", SCRIPT]
    flags = ["--world-size", 2, "--workers", 4, "--root", MNIST, "--epochs", 1]
    with WarmAgent([*launch, *flags], cwd=folder) as agent:
        return folder, agent.finish()


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The second command: the script starts its own processes. Here with every other flag."""
    folder = tmp_path_factory.mktemp("spawned")
    flags = ["-s", 2, "-j", 4, "--root", MNIST, "--epochs", 1, "--start-epoch", 0, "--batch-size", 256]
    flags += ["--learning-rate", "1e-3", "--momentum", 0.9, "--wd", "1e-4", "--backend", "nccl"]
    flags += ["-i", "tcp://127.0.0.1:23456", "-r", 0, "--seed", 0]
    return folder, run([sys.executable, SCRIPT, *flags], cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["launched", "spawned"])
def test_one_line_an_epoch_and_the_originals_files(way: str, request: pytest.FixtureRequest) -> None:
    folder, ended = request.getfixturevalue(way)
    (line,) = epoch_lines(ended)
    assert line.group(1, 2) == ("0", "1")
    assert float(line[6]) > 90  # the original reaches this in one epoch
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint_0.pth.tar",
        "model_best.pth.tar",
    ]
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    for name in ("checkpoint_0.pth.tar", "model_best.pth.tar"):
        content = saved(folder, name)
        assert content["epoch"] == 1
        assert {key: tuple(value.shape) for key, value in content["state_dict"].items()} == {
            "module.fc.weight": (10, 784),
            "module.fc.bias": (10,),
        }
        assert f"{content['best_acc']:.2%}" == f"{line[6]}%"
        assert content["optimizer"]["param_groups"][0]["lr"] == 1e-3
        torch.optim.Adam(torch.nn.Linear(784, 10).parameters()).load_state_dict(content["optimizer"])


@pytest.mark.slow
def test_both_ways_train_the_same(launched: tuple[Path, Finished], spawned: tuple[Path, Finished]) -> None:
    assert epoch_lines(launched[1])[0][0] == epoch_lines(spawned[1])[0][0]
    one, other = (saved(folder, "checkpoint_0.pth.tar")["state_dict"] for folder, _ in (launched, spawned))
    for name, value in one.items():
        assert torch.equal(value, other[name])


@pytest.mark.slow
def test_flags_without_effect_are_explained_once(
    launched: tuple[Path, Finished], spawned: tuple[Path, Finished]
) -> None:
    lines = (launched[1].stdout + launched[1].stderr).splitlines()
    assert sum("--workers" in line for line in lines) == 1
    lines = (spawned[1].stdout + spawned[1].stderr).splitlines()
    for flag in ("--workers", "--momentum", "--weight-decay", "--init-method", "--rank"):
        assert sum(flag in line for line in lines) == 1, flag
    assert "Traceback" not in launched[1].stderr + spawned[1].stderr


@pytest.mark.slow
def test_evaluate(launched: tuple[Path, Finished]) -> None:
    """The third command: the score equals the one in the epoch's line, and no file is written."""
    folder, ended = launched
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    flags = ["--world-size", 1, "--evaluate", "--resume", "checkpoints/model_best.pth.tar"]
    scored = script(*flags, "--root", MNIST, "--local-rank=0", cwd=folder)
    assert scored.code == 0, scored
    (score,) = [match for line in scored.stdout.splitlines() if (match := SCORE.search(line))]
    (line,) = epoch_lines(ended)
    assert score.group(1, 2) == line.group(5, 6)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_resume_continues_with_the_next_epoch(spawned: tuple[Path, Finished], tmp_path: Path) -> None:
    """From a file as the original writes it, without our additional fields."""
    content = saved(spawned[0], "checkpoint_0.pth.tar")
    theirs = {key: content[key] for key in ("epoch", "state_dict", "best_acc", "optimizer")}
    torch.save(theirs, tmp_path / "start.pth.tar")
    flags = ["--root", MNIST, "--resume", "start.pth.tar", "--epochs", 2, "--local_rank=0"]
    flags += ["--batch-size", 2000]  # 30 steps
    ended = script(*flags, cwd=tmp_path)
    (line,) = epoch_lines(ended)
    assert line.group(1, 2) == ("1", "2")
    (before,) = epoch_lines(spawned[1])
    assert float(line[3]) < float(before[3])  # it did not start over
    assert saved(tmp_path, "checkpoint_1.pth.tar")["epoch"] == 2
    assert "=> loaded checkpoint 'start.pth.tar' (epoch 1)" in ended.stdout


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    ended = script("--root", MNIST, "--resume", "missing.pth.tar", cwd=tmp_path)
    assert ended.code == 4, ended
    assert ended.stderr.splitlines() == ["dmnist: missing.pth.tar: no such file or directory"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--world-size", 0], "--world-size"),
        (["--epochs", -1], "--epochs"),
        (["--lr", -1], "--lr"),
    ],
)
def test_impossible_values(flags: list[object], words: str, tmp_path: Path) -> None:
    ended = script("--root", MNIST, *flags, cwd=tmp_path)
    assert ended.code == 2, ended
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("dmnist: ")]
    assert words in line
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_of_the_original(tmp_path: Path) -> None:
    shown = script("--help", cwd=tmp_path).stdout
    for flag in (
        "--root",
        *("-j", "--workers", "--epochs", "--start-epoch", "--batch-size", "--lr", "--learning-rate"),
        *("--momentum", "--wd", "--weight-decay", "--resume", "-e", "--evaluate", "--backend"),
        *(
            "--local_rank",
            "--local-rank",
            "-i",
            "--init-method",
            "-s",
            "--world-size",
            "-r",
            "--rank",
            "--seed",
        ),
    ):
        assert re.search(rf"(^|[\s,]){re.escape(flag)}\b", shown), flag
