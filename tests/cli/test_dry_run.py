"""`dmnist train --dry-run` and `--summary`: what the run would do and how it would fail, without a file."""

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import Finished, train
from warm import here

from distributed_mnist.cli import dry_run

SMALL = ("--device", "cpu", "--recipe", "classic", "--epochs", 2, "--batch-size", 128)


def dry(digits: Path, *flags: object) -> Finished:
    return here("train", *SMALL, "--dataset", "idx", "--data", digits, "--nproc", 1, "--dry-run", *flags)


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def good(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    train(
        *SMALL,
        "--dataset",
        "idx",
        "--data",
        digits,
        "--steps",
        4,
        "--checkpoint-every",
        4,
        nproc=1,
        out=out,
    )
    return out


def test_a_new_run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = dry(digits, "--summary")
    assert ended.code == 0, ended
    lines = dict(re.findall(r"^(\w+) {2,}(.*)$", ended.stdout, re.MULTILINE))
    assert lines["recipe"].startswith("classic: linear with 7,850 parameters, 2 epochs in batches of 128")
    assert lines["data"] == f"idx, 1,100 + 300 images, {digits}"
    assert lines["world"] == "1 process on cpu, 1 thread each"
    assert lines["steps"] == "18 (an epoch has 9)"
    assert re.search(r"^  fc +NarrowLinear +\(N, 10\) +7,850$", ended.stdout, re.MULTILINE)
    assert ended.stdout.endswith("a dry run: nothing was trained or written\n")
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_checkpoint_is_right(digits: Path, good: Path) -> None:
    before = files_in(good)
    plan = dry(digits, "--out", good, "--resume", "auto", "--json").json()
    assert files_in(good) == before
    assert (plan["step"], plan["steps"], plan["steps_per_epoch"]) == (4, 18, 9)
    assert plan["resume"] == str(good / "checkpoints" / "step_00000004.pt")
    written = (good / "checkpoints" / "step_00000004.pt").stat().st_size
    assert 0.9 < plan["checkpoint_bytes"] / written < 1.1


def test_ranks_that_share_the_work_of_the_optimizer(digits: Path) -> None:
    """Only rank 0 plans, so no other rank would take its part of Muon's products."""
    flags = ("--model", "mlp", "--optimizer", "muon", "--dry-run", "--json", "--nproc", 2)
    plan = here("train", *SMALL, *flags, "--dataset", "idx", "--data", digits).json()
    assert plan["world_size"] == 2
    assert plan["checkpoint_bytes"] > 2 * 4 * plan["parameters"]  # weights, and momentum of most of them


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--out", "{good}"), 6, "already holds a run: add --resume auto"),
        (("--out", "{good}/metrics.jsonl/x"), 6, "not a directory"),
        (("--out", "{good}", "--resume", "auto", "--lr", 1), 4, "--lr 0.001 there, 1.0 here"),
        (("--resume", "{good}/nothing.pt"), 4, "no such file or directory"),
        (("--model", "user_models:eleven_classes"), 2, "user_models:eleven_classes"),
        (("--model", "user_models:few_images"), 2, "ValueError: 7 images are too many (user_models.py"),
        (("--dataset", "idx", "--data", "{good}"), 3, "{good}"),
    ],
)
def test_what_would_fail(
    flags: tuple[object, ...], code: int, words: str, digits: Path, good: Path, tmp_path: Path
) -> None:
    before = files_in(good)
    ended = dry(digits, "--out", tmp_path / "out", *[str(flag).format(good=good) for flag in flags])
    assert (ended.code, ended.stdout) == (code, "")
    assert len(ended.stderr.splitlines()) == 1
    assert words.format(good=good) in ended.stderr
    assert list(tmp_path.iterdir()) == []
    assert files_in(good) == before


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    plan = here(
        *(
            "train",
            *SMALL,
            "--data",
            tmp_path,
            "--out",
            tmp_path / "out",
            "--dry-run",
            "--json",
            "--nproc",
            1,
            "--validation",
            5000,
        )
    ).json()
    assert plan["download"].startswith(f"mnist, not in {tmp_path}: a run would download it from https://")
    assert (plan["steps"], plan["parameters"]) == (None, 7850)
    assert list(tmp_path.iterdir()) == []


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    layer: dict[str, Any] = {"type": "T" * 90, "output": [None, 3], "parameters": 7, "calls": 2}
    layers = [{**layer, "name": ".".join(["inner"] * depth)} for depth in range(12)]
    console = dry_run.Console(width=80)
    console.print(dry_run.layer_table("mine:net", layers))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert max(map(len, lines)) <= 80
