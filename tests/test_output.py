"""What a run prints and what it leaves: one JSON object, one folder, a bar only at a terminal."""

import contextlib
import json
import math
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ranks import DMNIST, PATIENCE, Finished, dmnist, environment, events, run, train

from distributed_mnist.checkpoint import decode

EPOCHS, BATCH, STEPS_PER_EPOCH = 3, 64, 18
RECIPE = ("--recipe", "classic", "--epochs", EPOCHS, "--batch-size", BATCH)
KEYS = (
    *("dataset", "model", "world_size", "epochs", "steps", "test_accuracy", "test_loss", "test_images"),
    *("weights_sha256", "samples_sha256", "data_sha256", "train_seconds", "images_per_second", "out"),
)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A fresh `dmnist train --json` with two processes, its output in pipes."""
    out = tmp_path_factory.mktemp("json") / "out"
    words = ("train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *RECIPE)
    return out, run(
        [*DMNIST, *words, "--eval-every", "9 steps", "--out", out, "--json"], TERM="xterm-256color"
    )


def test_json_is_one_object_and_nothing_else(finished: tuple[Path, Finished]) -> None:
    out, ended = finished
    result = ended.json()
    assert [key for key in KEYS if key not in result] == []
    assert (result["dataset"], result["model"]) == ("idx", "linear")
    assert (result["world_size"], result["epochs"], result["steps"]) == (
        2,
        EPOCHS,
        EPOCHS * STEPS_PER_EPOCH,
    )
    assert result["test_images"] == 300
    assert 0.5 < result["test_accuracy"] < 1
    assert 0 < result["test_loss"] < 2
    assert result["out"] == str(out)
    assert result["train_seconds"] > 0
    assert result["images_per_second"] > 0
    for name in ("weights", "samples", "data"):
        assert len(bytes.fromhex(result[f"{name}_sha256"])) == 32
    assert json.loads((out / "result.json").read_text()) == result


def test_evaluate_prints_the_same_keys(finished: tuple[Path, Finished], digits: Path) -> None:
    out, ended = finished
    scored = dmnist(
        "evaluate", out / "checkpoints" / "best.pt", "--data", digits, "--device", "cpu", "--json"
    ).json()
    assert [key for key in KEYS if key not in scored] == []
    assert scored["test_images"] == 300
    best = max(event["test_accuracy"] for event in events(out) if event["event"] == "evaluation")
    assert scored["test_accuracy"] == best
    assert scored["data_sha256"] == ended.json()["data_sha256"]


def test_people_read_standard_error_then(finished: tuple[Path, Finished]) -> None:
    """And without a terminal they read whole lines, without escape codes or bars."""
    _, ended = finished
    assert "\x1b" not in ended.stderr
    assert "\r" not in ended.stderr
    assert "epoch 3" in ended.stderr
    assert ended.json()["weights_sha256"] in ended.stderr
    assert "2 processes" in ended.stderr
    assert "[rank 1]" not in ended.stderr


def test_without_json_people_read_standard_output(digits: Path, tmp_path: Path) -> None:
    words = ("train", "--device", "cpu", "--nproc", 1, "--dataset", "idx", "--data", digits, *RECIPE)
    ended = dmnist(*words, "--out", tmp_path / "out", TERM="xterm-256color")
    assert ended.code == 0
    assert ended.stderr == ""
    assert "\x1b" not in ended.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["weights_sha256"] in ended.stdout
    assert f"{result['test_accuracy']:.2%}" in ended.stdout


def test_the_folder_of_a_run(finished: tuple[Path, Finished]) -> None:
    out, ended = finished
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert {"config.json", "metrics.jsonl", "checkpoints", "result.json"} <= names
    assert [path.name for path in out.rglob("*.part")] == []
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["model"] == "linear"
    assert config["recipe"]["batch_size"] == BATCH
    assert config["run"]["dataset"] == "idx"
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert len(checkpoints) == 4  # three to resume from, and the best
    assert (checkpoints[0], checkpoints[-1]) == ("best.pt", "step_00000054.pt")
    for name in checkpoints:
        content = decode((out / "checkpoints" / name).read_bytes(), name)
        assert content["recipe"] == config["recipe"]
        assert content["dataset"]["sha256"] == ended.json()["data_sha256"]


def test_metrics_have_every_step_once(finished: tuple[Path, Finished]) -> None:
    out, ended = finished
    lines = (out / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert [event["event"] for event in parsed[:1] + parsed[-1:]] == ["start", "end"]
    assert [event["time"] for event in parsed] == sorted(event["time"] for event in parsed)
    steps: list[int] = []
    for event in parsed:
        if event["event"] == "steps":
            first, count = event["first_step"], len(event["losses"])
            assert event["step"] == first + count - 1
            assert all(math.isfinite(loss) for loss in event["losses"])
            steps += range(first, first + count)
    assert steps == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    evaluations = [event for event in parsed if event["event"] == "evaluation"]
    assert [event["step"] for event in evaluations] == list(range(9, 55, 9))
    assert [event["test_images"] for event in evaluations] == [300] * 6
    assert evaluations[-1]["test_loss"] == ended.json()["test_loss"]
    assert parsed[-1]["result"] == ended.json()


def test_the_mean_loss_of_an_epoch_weighs_every_sample_alike(finished: tuple[Path, Finished]) -> None:
    """The last batch of an epoch has 12 samples instead of 64, and counts for 12."""
    out, _ = finished
    losses = [loss for event in events(out) if event["event"] == "steps" for loss in event["losses"]]
    sizes = [64] * 17 + [12]
    for epoch in range(EPOCHS):
        mine = losses[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        expected = sum(loss * size for loss, size in zip(mine, sizes, strict=True)) / 1_100
        (told,) = [
            event["train_loss"]
            for event in events(out)
            if event["event"] == "evaluation" and event["step"] == (epoch + 1) * STEPS_PER_EPOCH
        ]
        assert told == pytest.approx(expected, rel=1e-12)


def test_the_record_does_not_depend_on_the_number_of_processes(
    finished: tuple[Path, Finished], digits: Path, tmp_path: Path
) -> None:
    out, _ = finished
    train(
        "--dataset",
        "idx",
        "--data",
        digits,
        *RECIPE,
        "--eval-every",
        "9 steps",
        nproc=3,
        out=tmp_path / "out",
    )

    def record(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
        losses = [loss for event in events(folder) if event["event"] == "steps" for loss in event["losses"]]
        kept = ("step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best")
        found = [event for event in events(folder) if event["event"] == "evaluation"]
        return losses, [{name: event[name] for name in kept} for event in found]

    assert record(tmp_path / "out") == record(out)


def test_a_second_try_in_the_same_folder_is_described_by_its_own_config(
    digits: Path, tmp_path: Path
) -> None:
    """The first one broke down before its first checkpoint: the folder holds no run to go on with."""
    out = tmp_path / "out"
    words = (
        "train",
        "--device",
        "cpu",
        "--nproc",
        1,
        "--dataset",
        "idx",
        "--data",
        digits,
        *RECIPE,
        "--out",
        out,
    )
    assert dmnist(*words, "--model", "mlp", "--optimizer", "sgd", "--lr", "1e30").code == 7
    assert dmnist(*words).code == 0
    assert json.loads((out / "config.json").read_text())["recipe"]["model"] == "linear"


def test_runs_of_the_same_second_have_folders_of_their_own(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "train",
        "--device",
        "cpu",
        "--nproc",
        1,
        "--dataset",
        "idx",
        "--data",
        digits,
        "--recipe",
        "classic",
    )
    for _ in range(3):
        assert dmnist(*words, "--epochs", 1).code == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    assert all((folder / "result.json").exists() for folder in folders)
    assert all("classic" in folder.name for folder in folders)


@pytest.mark.slow
def test_a_live_bar_at_a_terminal(digits: Path, tmp_path: Path) -> None:
    words = ("train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *RECIPE)
    command = [*DMNIST, *map(str, words), "--epochs", "20", "--out", str(tmp_path / "out")]
    shown = at_a_terminal(command)
    assert "\x1b[" in shown
    assert "━" in shown  # the bar
    assert "/360" in shown  # its count of steps
    assert "images/s" in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2]  # the cursor is back
    assert "[rank 1]" not in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["weights_sha256"] in shown.replace("\r\n", "\n")


def at_a_terminal(command: list[str]) -> str:
    """All that a command writes to a pseudo-terminal of 120 columns."""
    master, slave = pty.openpty()
    variables = environment(TERM="xterm-256color", COLUMNS="120", LINES="40")
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=variables, start_new_session=True
    ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last process has closed the terminal
            while data := os.read(master, 65_536):
                shown += data
        os.close(master)
        assert process.wait(PATIENCE) == 0, shown.decode()
    return shown.decode()
