"""Test what a run prints and writes: one JSON object, one folder, and a bar only on a terminal."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ranks import DMNIST, PATIENCE, Finished, WarmProgram, environment, events, run, train
from rich.console import Console
from warm import here

from distributed_mnist.reporting.progress_bar import Terminal
from distributed_mnist.runs.checkpoint import decode

EPOCHS, BATCH, STEPS_PER_EPOCH = 3, 64, 18
RECIPE = ("--recipe", "classic", "--epochs", EPOCHS, "--batch-size", BATCH)
KEYS = (
    *("dataset", "model", "world_size", "epochs", "steps", "test_accuracy", "test_loss", "test_images"),
    *("weights_sha256", "samples_sha256", "data_sha256", "train_seconds", "images_per_second", "out"),
)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A `dmnist train --json` with two processes, its output in pipes."""
    out = tmp_path_factory.mktemp("json") / "out"
    arguments = ("train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *RECIPE)
    words = (*DMNIST, *arguments, "--eval-every", "9 steps", "--out", out, "--json")
    with WarmProgram(words, TERM="xterm-256color") as program:
        return out, program.finish()


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
    scored = here(
        "evaluate", out / "checkpoints" / "best.pt", "--data", digits, "--device", "cpu", "--json"
    ).json()
    assert [key for key in KEYS if key not in scored] == []
    assert scored["test_images"] == 300
    best = max(event["test_accuracy"] for event in events(out) if event["event"] == "evaluation")
    assert scored["test_accuracy"] == best
    assert scored["data_sha256"] == ended.json()["data_sha256"]


def test_with_json_the_text_goes_to_standard_error(finished: tuple[Path, Finished]) -> None:
    """Without a terminal it has whole lines, without escape codes or bars."""
    _, ended = finished
    assert "\x1b" not in ended.stderr
    assert "\r" not in ended.stderr
    assert "epoch 3" in ended.stderr
    assert ended.json()["weights_sha256"] in ended.stderr
    assert "2 processes" in ended.stderr
    assert "[rank 1]" not in ended.stderr


def test_without_json_the_text_goes_to_standard_output(digits: Path, tmp_path: Path) -> None:
    arguments = ("train", "--device", "cpu", "--nproc", 1, "--dataset", "idx", "--data", digits, *RECIPE)
    ended = here(*arguments, "--out", tmp_path / "out", TERM="xterm-256color")
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


def test_the_mean_loss_since_an_evaluation_weighs_all_samples_equally(
    finished: tuple[Path, Finished],
) -> None:
    """The last batch of an epoch has 12 samples instead of 64, and counts as 12."""
    out, _ = finished
    losses = [loss for event in events(out) if event["event"] == "steps" for loss in event["losses"]]
    sizes = ([64] * 17 + [12]) * EPOCHS
    evaluations = [event for event in events(out) if event["event"] == "evaluation"]
    since = 0
    for event in evaluations:
        rows = slice(since, event["step"])
        total = sum(loss * size for loss, size in zip(losses[rows], sizes[rows], strict=True))
        assert event["train_loss"] == pytest.approx(total / sum(sizes[rows]), rel=1e-12)
        since = event["step"]
    assert since == EPOCHS * STEPS_PER_EPOCH


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


def one_process(digits: Path) -> tuple[Any, ...]:
    return ("train", "--device", "cpu", "--nproc", 1, "--dataset", "idx", "--data", digits)


def test_a_second_run_in_the_same_folder_writes_its_own_config(digits: Path, tmp_path: Path) -> None:
    """The first run failed before its first checkpoint, so there is nothing to resume."""
    out = tmp_path / "out"
    arguments = (*one_process(digits), *RECIPE, "--out", out)
    assert here(*arguments, "--model", "mlp", "--optimizer", "sgd", "--lr", "1e30").code == 7
    assert here(*arguments).code == 0
    assert json.loads((out / "config.json").read_text())["recipe"]["model"] == "linear"


def test_runs_that_start_in_the_same_second_get_different_folders(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (*one_process(digits), "--recipe", "classic")
    for _ in range(3):
        assert here(*arguments, "--epochs", 1).code == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    assert all((folder / "result.json").exists() for folder in folders)
    assert all("classic" in folder.name for folder in folders)


@pytest.mark.slow
def test_a_live_bar_at_a_terminal(digits: Path, tmp_path: Path) -> None:
    arguments = ("train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *RECIPE)
    command = [*DMNIST, *map(str, arguments), "--epochs", "8", "--out", str(tmp_path / "out")]
    shown = at_a_terminal(command)
    assert "\x1b[" in shown
    assert "━" in shown  # the bar
    assert "/144" in shown  # its count of steps
    assert "images/s" in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2]  # the cursor is back
    assert "[rank 1]" not in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["weights_sha256"] in shown.replace("\r\n", "\n")


def at_a_terminal(command: list[str]) -> str:
    """Return all that a command writes to a pseudo-terminal of 120 columns."""
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


# ---- What a terminal shows -------------------------------------------------------------------------------

RESULT: dict[str, Any] = {
    **{
        "test_accuracy": 0.9926,
        "test_loss": 0.02,
        "test_images": 10_000,
        "steps": 470,
        "train_seconds": 19.71,
    },
    **{f"{name}_sha256": "0123456789abcdef" * 4 for name in ("weights", "samples", "data")},
    **{"images_per_second": 11_884.2, "out": "runs/[bold]x"},
}


def terminal(
    width: int, *, step: int = 235, epochs: int = 2, again: bool = False, ranks: bool = False, **more: Any
) -> str:
    """Return all that a run prints, without escape codes; a `width` of 0 is a pipe."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=bool(width), width=width or 1000, color_system=None)
    sink = Terminal(console, ranks=ranks)
    recipe = "default: cnn with 215,194 parameters, 2 epochs in batches of 256, tree over 8 shards, seed 0"
    lines = {"recipe": recipe, "out": "runs/x"}
    sink.log("start", lines=lines, epochs=epochs, steps=470, step=0, again=again)
    sink.log("steps", step=step, epoch=0.5, loss=0.123456, images_per_second=11_884.2)
    scores = {
        "train_loss": 0.21281,
        "train_accuracy": 0.93624,
        "test_loss": 0.0793,
        "test_accuracy": 0.97641,
    }
    sink.log("evaluation", epoch=1.0, **scores)
    sink.log("notice", text="a notice that goes on and on for longer than a narrow terminal has columns")
    sink.log("end", result={**RESULT, **more})
    sink.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n")


def test_a_run_with_a_validation_split_says_so() -> None:
    shown = io.StringIO()
    sink = Terminal(Console(file=shown, width=1000))
    scores = {"validation_loss": 0.0793, "validation_accuracy": 0.97641}
    sink.log("evaluation", epoch=1.0, train_loss=0.21, train_accuracy=0.93, **scores)
    chosen = {"best_step": 300, "validation_accuracy": 0.98, "validation_images": 5_000}
    sink.log("end", result={**RESULT, **chosen})
    lines = shown.getvalue().splitlines()
    assert lines[0].endswith("accuracy 93.00%; validation loss 0.0793, accuracy 97.64%")
    assert "best            the weights after step 300: 98.00% of 5,000 validation images" in lines
    assert "test accuracy   99.26% of 10,000 images" in lines


def write_to_a_full_disk() -> None:
    """Let this process's standard output be one that cannot be written."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_full_disk_ends_the_log_but_not_the_run(nproc: int, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "train",
        "--device",
        "cpu",
        "--nproc",
        nproc,
        "--dataset",
        "idx",
        "--data",
        digits,
        *RECIPE,
    ]
    arguments += ["--out", out]
    if nproc == 1:
        ended = run(["sh", "-c", 'exec "$@" > /dev/full', "sh", *DMNIST, *arguments])
    else:  # a worker writes, which is forked from a warm server in a fresh program too
        with WarmProgram((*DMNIST, *arguments), write_to_a_full_disk, cwd=tmp_path) as program:
            ended = program.finish()
    assert ended.code == 0, ended
    assert (
        ended.stderr == "dmnist: no further output is shown (no space left on device); the run continues\n"
    )
    assert json.loads((out / "result.json").read_text())["steps"] == EPOCHS * STEPS_PER_EPOCH
    if nproc == 1:
        command = (*DMNIST, "evaluate", out, "--device", "cpu")
        with WarmProgram(command, write_to_a_full_disk, cwd=tmp_path) as program:
            ended = program.finish()
        assert ended.code == 6
        assert ended.stderr == "dmnist: the output cannot be written: no space left on device\n"


def write_to_head() -> None:
    """Let this process's standard output be a pipe whose reader ends after one line."""
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE)
    assert head.stdin is not None
    os.dup2(head.stdin.fileno(), 1)
    head.stdin.close()


def test_a_closed_pipe_does_not_stop_the_run(digits: Path, tmp_path: Path) -> None:
    arguments = ["train", "--device", "cpu", "--dataset", "idx", "--data", digits, *RECIPE]
    command = (*DMNIST, *arguments, "--out", tmp_path / "out")
    with WarmProgram(command, write_to_head, cwd=tmp_path) as program:
        ended = program.finish()
    assert ended.code == 0, ended
    assert ended.stdout.startswith("recipe ")
    assert ended.stdout.count("\n") == 1, ended
    assert (tmp_path / "out" / "result.json").is_file()


def test_a_folder_may_have_any_name(finished: tuple[Path, Finished], tmp_path: Path) -> None:
    odd = tmp_path / "[bold]a[" / "b]"
    odd.parent.mkdir()
    odd.symlink_to(finished[0])
    assert here("report", odd).stdout == f"{odd / 'report.html'}\n"
    output = here("evaluate", odd, "--device", "cpu").stdout
    assert output.startswith(f"{odd / 'checkpoints' / 'step_00000054.pt'}: test accuracy ")


def test_a_pipe_gets_whole_lines_without_trailing_spaces() -> None:
    lines = terminal(0).splitlines()
    assert lines[0].endswith("seed 0")
    assert lines[1] == "out      runs/x"
    assert lines[2].startswith("epoch 1  train loss 0.2128, accuracy 93.62%; test loss 0.0793, ")
    assert lines[3].startswith("note     a notice")
    assert lines[3].endswith("columns")
    assert lines[4:7] == ["", "test accuracy   99.26% of 10,000 images", "test loss       0.020000"]
    assert lines[7] == "training        470 steps in 19.71 s, 11,884 images/s"
    assert lines[-1] == "in              runs/[bold]x"
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_restarted_run_does_not_repeat_its_first_lines() -> None:
    assert terminal(0, again=True).splitlines() == terminal(0).splitlines()[2:]
    note = "note     a process was lost: all processes restart from step 0"  # `dmnist watch` shows it
    assert terminal(0, again=True, ranks=True).splitlines() == [note, *terminal(0).splitlines()[2:]]


def test_a_narrow_terminal_wraps_at_words_under_the_text() -> None:
    lines = [line.rstrip() for line in terminal(60).splitlines()]
    assert max(map(len, lines)) <= 60
    start = lines.index("recipe   default: cnn with 215,194 parameters, 2 epochs in")
    assert lines[start + 1] == "         batches of 256, tree over 8 shards, seed 0"
    assert "         narrow terminal has columns" in lines
    assert (
        "                " + ("0123456789abcdef" * 4)[44:] in lines
    )  # no space to wrap at: it continues below


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (120, {"epoch 1/2", "step 235/470", "loss 0.1235", "test 97.64%", "images/s", "━"}),
        (60, {"step 235/470", "loss 0.1235", "test 97.64%", "━"}),
        (40, {"step 235/470", "━"}),
        (24, {"step 235/470"}),
    ],
)
def test_the_bar_drops_what_does_not_fit(width: int, parts: set[str]) -> None:
    every = {"epoch 1/2", "step 235/470", "loss 0.1235", "test 97.64%", "images/s", "━"}
    bars = [line for line in terminal(width).splitlines() if "step 235/470" in line]
    assert bars
    assert {part for part in every if part in bars[-1]} == parts
    assert re.search(r"[\d-]+:[\d-]+\s*$", bars[-1])  # the time left


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "470 steps in 19.71 s, 11,884 images/s"),
        ({"steps_here": 470, "seconds_here": 19.71}, "470 steps in 19.71 s, 11,884 images/s"),
        (
            {"steps_here": 136, "seconds_here": 9.6, "images_per_second": 3_626.7},
            "136 of 470 steps here, in 9.6 s, 3,627 images/s",
        ),
        (
            {"steps_here": 0, "seconds_here": 0.0, "images_per_second": None},
            "470 steps, finished before; nothing left to do",
        ),
        ({"steps": 1, "steps_here": 1}, "1 step in 19.71 s, 11,884 images/s"),
    ],
)
def test_the_duration_of_a_run(more: dict[str, Any], said: str) -> None:
    (line,) = [line for line in terminal(0, **more).splitlines() if line.startswith("training")]
    assert line == f"training        {said}"


# ---- Other commands --------------------------------------------------------------------------------------

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def test_versions() -> None:
    """`--version` does not import torch, which would take long."""
    ended = run([*DMNIST, "--version"])
    ours, torch = importlib.metadata.version("distributed-mnist"), importlib.metadata.version("torch")
    assert ended == Finished(0, f"dmnist {ours}, torch {torch}\n", "")


def test_generate_and_fetch(
    finished: tuple[Path, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("data", "generate", "drawn", "--train-size", 1_100, "--test-size", 300)
    paths = [f"drawn/{name}.gz" for name in NAMES]
    ended = here(*arguments)
    assert ended.code == 0, ended
    summary = "1,100 + 300 images generated with seed 0: use them with --dataset idx --data drawn"
    assert ended.stdout.splitlines() == [*paths, summary]
    ended = here(*arguments, "--json")
    assert ended.stderr == ""
    assert ended.json() == {
        **{"dataset": "generated", "train_size": 1_100, "test_size": 300, "data_seed": 0},
        **{"data_sha256": finished[1].json()["data_sha256"], "paths": paths},
    }
    fetched = here("data", "fetch", "idx", "--data", "drawn", "--json")
    assert fetched.json() == {"dataset": "idx", "paths": paths}
    assert here("data", "fetch", "idx", "--data", "drawn").stdout.splitlines() == paths


def test_check(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(digits)
    ended = here("data", "check", "idx")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "data/train-images-idx3-ubyte.gz  1,100 rows  ok (no published checksum)",
        "data/train-labels-idx1-ubyte.gz  1,100 rows  ok (no published checksum)",
        "data/t10k-images-idx3-ubyte.gz     300 rows  ok (no published checksum)",
        "data/t10k-labels-idx1-ubyte.gz     300 rows  ok (no published checksum)",
    ]


def test_check_of_an_incomplete_data_set(digits: Path, tmp_path: Path) -> None:
    for name in NAMES[:3]:
        (tmp_path / f"{name}.gz").symlink_to(digits / f"{name}.gz")
    ended = here("data", "check", "idx", "--data", tmp_path)
    lacking = tmp_path / NAMES[3]
    said = f"dmnist: 1 of 4 files of idx cannot be used: {lacking}\n"
    assert (ended.code, ended.stderr) == (3, said)
    assert re.fullmatch(rf"{lacking} +- rows  missing", ended.stdout.splitlines()[3])
    ended = here("data", "check", "idx", "--data", tmp_path, "--json")
    assert (ended.code, ended.stderr) == (3, said)
    files = json.loads(ended.stdout)["files"]
    assert [(file["ok"], file["rows"]) for file in files] == [
        (True, 1_100),
        (True, 1_100),
        (True, 300),
        (False, None),
    ]
