"""Test that a run that is stopped, killed or damaged, and resumed at any size, ends with the same weights.

An interrupted run is given more epochs than anyone would wait for, so that a signal cannot come too late.
The rate of the classic recipe does not look ahead, so such a run begins exactly like a shorter one, and
what it left is resumed as one that ends an epoch or two after the place where it stopped.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import paced
import psutil
import pytest
from ranks import (
    DMNIST,
    PATIENCE,
    Finished,
    Program,
    WarmProgram,
    dmnist,
    events,
    last_step,
    processes,
    train,
)

import distributed_mnist as library
from distributed_mnist.config import MNIST_SHAPE
from distributed_mnist.data import datasets
from distributed_mnist.errors import CheckpointError
from distributed_mnist.runs.checkpoint import decode, encode
from distributed_mnist.training.resume import data_differences

STEPS_PER_EPOCH = 50
COMMON = ("--recipe", "classic", "--model", "paced:network", "--batch-size", 22, "--lr", 0.003)

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@pytest.fixture(scope="module")
def flags(digits: Path) -> tuple[object, ...]:
    return ("--dataset", "idx", "--data", digits, *COMMON)


@pytest.fixture(scope="module")
def undisturbed(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`undisturbed(epochs)` returns the result of a run without faults; each run happens once."""

    @cache
    def run_once(epochs: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        return train(*flags, "--epochs", epochs, nproc=1, out=out)

    return run_once


def endless(flags: tuple[object, ...], out: Path, nproc: int, *more: object) -> list[object]:
    """Return the words of a `dmnist train` with too many epochs to end by itself."""
    words = ["train", "--device", "cpu", "--nproc", nproc, *flags, "--epochs", 1_000_000]
    return [*words, "--out", out, *more]


def program_of_two(flags: tuple[object, ...], out: Path, *more: object) -> Program:
    """Start it with two processes, and with pauses: the processor has other things to do."""
    command = [*DMNIST, *endless(flags, out, 2, *more)]
    return WarmProgram(command, PACED_UNTIL=str(out / "never"), PYTHONPATH=paced.python_path())


def in_the_middle(program: Program, out: Path) -> None:
    program.wait_for(lambda: last_step(out) >= 5, "step 5")


def interrupted(
    flags: tuple[object, ...],
    out: Path,
    nproc: int,
    interrupt: Callable[[int, list[int]], None],
    *more: object,
) -> Finished:
    """Start it from the warm server, and call `interrupt(launcher, workers)` with their pids meanwhile.

    Return how it ended; no worker is left then.
    """
    deadline = time.monotonic() + PATIENCE
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(dmnist, *endless(flags, out, nproc, *more))
        while last_step(out) < 20:
            assert not ending.done(), ending.result()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (launcher,) = multiprocessing.active_children()
        assert launcher.pid is not None
        workers = [rank["pid"] for rank in events(out)[0]["ranks"]]
        interrupt(launcher.pid, workers)
        ended = ending.result()
    assert len(workers) == nproc
    assert not any(map(psutil.pid_exists, workers))
    return ended


def same_again(undisturbed: Any, flags: tuple[object, ...], out: Path, nproc: int, start: int) -> None:
    """Resume the run in `out` with `nproc` processes, at step `start`, and compare the results."""
    epochs = max(3, start // STEPS_PER_EPOCH + 2)  # usually 3: the undisturbed run is the same one
    resumed = train(*flags, "--epochs", epochs, "--resume", "auto", nproc=nproc, out=out)
    begun = [event["step"] for event in events(out) if event["event"] == "start"]
    assert begun == [0, start]
    expected = undisturbed(epochs)
    for name in ("weights_sha256", "samples_sha256", "test_loss", "test_accuracy", "steps", "data_sha256"):
        assert resumed[name] == expected[name], name
    assert resumed["world_size"] == nproc
    assert recorded_losses(out) == recorded_losses(Path(expected["out"]))


def recorded_losses(out: Path) -> dict[int, float]:
    """Return each step's loss; of a repeated step the last one counts."""
    return {
        event["first_step"] + i: loss
        for event in events(out)
        if event["event"] == "steps"
        for i, loss in enumerate(event["losses"])
    }


def stopped_at(ended: Finished) -> int:
    """Return the step after which an interrupted run says, in one line, that it stopped."""
    assert ended.code == 75, ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dmnist: ")]
    assert len(lines) == 1, ended
    assert "Traceback" not in ended.stderr
    match = re.search(r"after step (\d+) of", lines[0])
    assert match, ended
    return int(match[1])


def saved(out: Path) -> list[int]:
    """Return the steps of the checkpoints in a run's folder."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*.pt"))


def workers(program: Program, out: Path) -> list[int]:
    """Return the workers' pids by rank."""
    started = [event for event in events(out) if event["event"] == "start"][-1]
    found = [rank["pid"] for rank in started["ranks"]]
    assert len(found) == 2 and set(found) <= processes(program.pid).keys()
    return found


def assert_nothing_left(program: Program) -> None:
    """Assert that every process ends soon; the server from which they were forked ends last."""
    deadline = time.monotonic() + PATIENCE
    while left := processes(program.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# The signal, who gets it, the number of processes, and that of the resumed run.
STOPS = {
    "SIGINT": (signal.SIGINT, "launcher", 2, 1),
    "SIGUSR2, a single process": (signal.SIGUSR2, "launcher", 1, 4),
    "SIGTERM to one worker": (signal.SIGTERM, "worker", 2, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_asked_to_stop(how: str, undisturbed: Any, flags: tuple[object, ...], tmp_path: Path) -> None:
    """All ranks stop at one step with a checkpoint and exit code 75, and no work is lost."""
    number, target, nproc, nproc_later = STOPS[how]

    def interrupt(launcher: int, workers: list[int]) -> None:
        os.kill(launcher if target == "launcher" else workers[1], number)

    out = tmp_path / "out"
    ended = interrupted(flags, out, nproc, interrupt)
    assert_nothing_lost(ended, out)
    same_again(undisturbed, flags, out, nproc_later, stopped_at(ended))


@pytest.mark.slow
@needs_proc
def test_all_processes_are_asked_to_stop(
    undisturbed: Any, flags: tuple[object, ...], tmp_path: Path
) -> None:
    """Schedulers and terminals do this: the server that forked the workers gets the signal too."""
    out = tmp_path / "out"
    with program_of_two(flags, out) as program:
        in_the_middle(program, out)
        program.signal(signal.SIGHUP, group=True)
        ended = program.finish()
        assert_nothing_left(program)
    assert_nothing_lost(ended, out)
    same_again(undisturbed, flags, out, 3, stopped_at(ended))


def assert_nothing_lost(ended: Finished, out: Path) -> None:
    assert stopped_at(ended) == last_step(out) == saved(out)[-1]
    assert not (out / "result.json").exists()


@pytest.mark.slow
def test_a_worker_is_killed_and_not_started_again(
    undisturbed: Any, flags: tuple[object, ...], tmp_path: Path
) -> None:
    """One line names the worker, no process is left, and only work since the last checkpoint is lost."""
    out, pids = tmp_path / "out", []

    def interrupt(launcher: int, workers: list[int]) -> None:
        pids.extend(workers)
        os.kill(workers[1], signal.SIGKILL)

    ended = interrupted(flags, out, 2, interrupt, "--checkpoint-every", 5, "--max-restarts", 0)
    assert ended.code == 8, ended
    lines = ended.stderr.splitlines()
    told = [line for line in lines if line.startswith("dmnist: ")]
    assert len(told) == 1, ended
    assert f"rank 1 (pid {pids[1]}) was ended by SIGKILL" in told[0]
    assert "Traceback" not in ended.stderr
    newest = saved(out)[-1]
    assert newest % 5 == 0
    same_again(undisturbed, flags, out, 3, newest)


@pytest.mark.slow
@needs_proc
def test_the_launcher_is_killed(undisturbed: Any, flags: tuple[object, ...], tmp_path: Path) -> None:
    """To its workers this is a request to stop: they save a checkpoint and end."""
    out = tmp_path / "out"
    with program_of_two(flags, out, "--checkpoint-every", 4) as program:
        in_the_middle(program, out)
        assert len(workers(program, out)) == 2
        program.signal(signal.SIGKILL)
        ended = program.finish()  # returns when the last worker has closed the output
        assert ended.code == -signal.SIGKILL
        assert_nothing_left(program)
    same_again(undisturbed, flags, out, 2, saved(out)[-1])


# ---- Checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one epoch with checkpoints after steps 30, 40 and 50."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    train(*flags, "--epochs", 1, "--checkpoint-every", 10, "--eval-every", 25, nproc=2, out=out)
    assert saved(out) == [30, 40, 50]
    return out


@pytest.fixture
def copy(halfway: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, without its result, for tests that damage it."""
    out = tmp_path / "copy"
    (out / "checkpoints").mkdir(parents=True)
    for path in (halfway / "checkpoints").glob("step_*.pt"):
        (out / "checkpoints" / path.name).write_bytes(path.read_bytes())
    return out


def test_from_a_path_into_another_folder(
    undisturbed: Any, flags: tuple[object, ...], halfway: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in halfway.rglob("*") if path.is_file()}
    path = halfway / "checkpoints" / "step_00000030.pt"
    out = tmp_path / "elsewhere" / "out"
    resumed = train(*flags, "--epochs", 2, "--resume", path, nproc=3, out=out)
    assert resumed["weights_sha256"] == undisturbed(2)["weights_sha256"]
    assert resumed["samples_sha256"] == undisturbed(2)["samples_sha256"]
    assert [event["step"] for event in events(out) if event["event"] == "start"] == [30]
    assert {path: path.read_bytes() for path in halfway.rglob("*") if path.is_file()} == before
    assert (out / "config.json").exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replaced_by_text(path: Path) -> None:
    path.write_text("No space left on device\n")


def test_a_damaged_checkpoint_is_passed_over(
    undisturbed: Any, flags: tuple[object, ...], copy: Path
) -> None:
    newest = copy / "checkpoints" / "step_00000050.pt"
    one_bit_flipped(newest)
    more = ("--device", "cpu", "--nproc", 1, "--epochs", 2, "--resume", "auto", "--out", copy, "--json")
    ended = dmnist("train", *flags, *more)
    assert ended.json()["weights_sha256"] == undisturbed(2)["weights_sha256"]
    assert ended.json()["samples_sha256"] == undisturbed(2)["samples_sha256"]
    notes = [line for line in ended.stderr.splitlines() if line.startswith("note")]
    assert str(newest) in notes[0]
    assert "damaged" in notes[0]
    assert "step_00000040.pt at step 40 of 100" in notes[1]


def test_two_damaged_checkpoints(undisturbed: Any, flags: tuple[object, ...], copy: Path) -> None:
    replaced_by_text(copy / "checkpoints" / "step_00000050.pt")
    truncated(copy / "checkpoints" / "step_00000040.pt")
    resumed = train(*flags, "--epochs", 2, "--resume", "auto", nproc=3, out=copy)
    assert [event["step"] for event in events(copy) if event["event"] == "start"] == [30]
    assert resumed["weights_sha256"] == undisturbed(2)["weights_sha256"]


def test_nothing_but_damaged_checkpoints(undisturbed: Any, flags: tuple[object, ...], copy: Path) -> None:
    """The run starts from the beginning and reports that."""
    for path in (copy / "checkpoints").glob("*.pt"):
        emptied(path)
    resumed = train(*flags, "--epochs", 2, "--resume", "auto", nproc=2, out=copy)
    assert resumed["weights_sha256"] == undisturbed(2)["weights_sha256"]
    notes = [event["text"] for event in events(copy) if event["event"] == "notice"]
    assert [str(step) in note for step, note in zip((50, 40, 30), notes, strict=False)] == [True] * 3
    assert "there is no checkpoint yet" in notes[3]


def test_a_checkpoint_of_other_versions_is_resumed_with_a_notice(
    flags: tuple[object, ...], copy: Path
) -> None:
    newest = copy / "checkpoints" / "step_00000050.pt"
    content = decode(newest.read_bytes(), "it")
    now = dict(content["versions"])
    content["versions"] = {**now, "dmnist": "0.0.1", "torch": "2.9.0"}
    newest.write_bytes(encode(content))
    train(*flags, "--epochs", 2, "--resume", "auto", nproc=1, out=copy)
    changes = f"dmnist 0.0.1 then, {now['dmnist']} now; torch 2.9.0 then, {now['torch']} now"
    notices = [event["text"] for event in events(copy) if event["event"] == "notice"]
    assert f"{newest} was computed differently ({changes}): the last bits may differ" in notices


def test_auto_in_an_empty_folder_starts(
    undisturbed: Any, flags: tuple[object, ...], tmp_path: Path
) -> None:
    """This lets a job script use `--resume auto` the first time as well."""
    started = train(*flags, "--epochs", 2, "--resume", "auto", nproc=2, out=tmp_path / "new")
    assert started["weights_sha256"] == undisturbed(2)["weights_sha256"]


def test_auto_in_a_finished_run_changes_nothing(
    undisturbed: Any, flags: tuple[object, ...], halfway: Path, copy: Path
) -> None:
    """So a job that is requeued once too often does no harm."""
    shutil.copy(halfway / "result.json", copy)
    before = (copy / "result.json").read_bytes()
    again = train(*flags, "--epochs", 1, "--resume", "auto", nproc=2, out=copy)
    assert again["weights_sha256"] == undisturbed(1)["weights_sha256"]
    assert again["samples_sha256"] == undisturbed(1)["samples_sha256"]
    assert again["steps"] == 50
    assert saved(copy) == [30, 40, 50]
    assert (copy / "result.json").read_bytes() == before  # with the speed of the training


def test_damaged_files_beside_the_checkpoints(
    flags: tuple[object, ...], digits: Path, halfway: Path, copy: Path
) -> None:
    """A damaged record fails no run; a damaged config is not gone on with."""
    for name in ("config.json", "metrics.jsonl", "result.json"):
        shutil.copy(halfway / name, copy)
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "steps", "time": 1.0, "step": 7}\n\xff\n' + b"[" * 100_000 + b"\n")
    (copy / "result.json").write_text("{")
    again = dmnist("train", *flags, "--epochs", 1, "--resume", "auto", "--out", copy, "--device", "cpu")
    assert (again.code, again.stderr) == (0, "")
    assert f"report: {copy / 'metrics.jsonl'}: 3 damaged lines skipped\n" in again.stdout
    assert json.loads((copy / "result.json").read_text())["steps"] == 50
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"epochs": 1', '"epochs": 6'))
    checkpoint = copy / "checkpoints" / "step_00000030.pt"
    for command in (
        ("train", "--resume", "auto", "--out", copy),
        ("evaluate", checkpoint, "--model", "paced:network"),
    ):
        ended = dmnist(*command, "--nproc", 1, "--device", "cpu")
        assert ended.code == 4, ended
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"dmnist: {config} was damaged or changed (it does not match its digest): ")


def test_a_schedule_that_looks_ahead_resumes_too(digits: Path, tmp_path: Path) -> None:
    """Resume from the middle of an epoch with one-cycle, Adam's two moments, an average of weights,
    augmentation, dropout and batch norm's running statistics."""
    flags = ("--dataset", "idx", "--data", digits, "--model", "user_models:batch_norm", "--batch-size", 130)
    flags += ("--epochs", 2, "--shift", 2, "--schedule", "one-cycle", "--checkpoint-every", 4)
    flags += ("--average", 0.4)
    whole = train(*flags, nproc=2, out=tmp_path / "whole")
    start = tmp_path / "whole" / "checkpoints" / "step_00000012.pt"
    assert start.exists()
    resumed = train(*flags, "--resume", start, nproc=3, out=tmp_path / "resumed")
    for name in ("weights_sha256", "samples_sha256", "test_loss", "steps"):
        assert resumed[name] == whole[name]


def test_resumes_with_the_recipe_and_the_data_of_the_run(digits: Path, tmp_path: Path) -> None:
    """The flags that the program suggests are enough."""
    words = ("--dataset", "idx", "--data", digits, "--recipe", "fast", "--shift", 1, "--batch-size", 100)
    whole = train(*words, nproc=1, out=tmp_path / "whole")
    start = train(*words, "--checkpoint-every", 4, nproc=1, out=tmp_path / "out")
    assert start == {**whole, **{key: start[key] for key in start if "second" in key or key == "out"}}
    for path in (tmp_path / "out" / "checkpoints").glob("*.pt"):
        if path.name != "step_00000008.pt":
            path.unlink()
    (tmp_path / "out" / "result.json").unlink()
    resumed = train("--resume", "auto", nproc=2, out=tmp_path / "out")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert events(tmp_path / "out")[-1]["result"]["steps_here"] == whole["steps"] - 8


def test_another_recipe_is_still_refused(digits: Path, tmp_path: Path) -> None:
    words = ("--dataset", "idx", "--data", digits, "--recipe", "fast", "--steps", 2)
    train(*words, nproc=1, out=tmp_path)
    ended = dmnist("train", "--resume", "auto", "--out", tmp_path, "--lr", 0.5, "--nproc", 1)
    assert ended.code == 4
    assert "--lr" in ended.stderr
    ended = dmnist("train", "--resume", "auto", "--out", tmp_path, "--recipe", "default", "--nproc", 1)
    assert ended.code == 4


def test_a_model_of_ones_own_is_not_taken_from_the_run(digits: Path, tmp_path: Path) -> None:
    """A file must not choose what is imported."""
    words = ("--dataset", "idx", "--data", digits, "--model", "user_models:dropout", "--steps", 2)
    train(*words, nproc=1, out=tmp_path)
    ended = dmnist("train", "--resume", "auto", "--out", tmp_path, "--nproc", 1)
    assert ended.code == 4
    assert "--model user_models:dropout there, cnn here" in ended.stderr


def test_other_data_are_refused_as_such(digits: Path, tmp_path: Path) -> None:
    words = (
        "--dataset",
        "generated",
        "--train-size",
        300,
        "--test-size",
        50,
        "--recipe",
        "classic",
        "--steps",
        2,
    )
    train(*words, nproc=1, out=tmp_path)
    here = ("--dataset", "idx", "--data", digits, "--nproc", 1)
    ended = dmnist("train", "--resume", "auto", "--out", tmp_path, *here)
    assert ended.code == 4
    assert "was trained on different data: generated" in ended.stderr


def test_other_normalisation_of_the_same_images_is_refused(tmp_path: Path) -> None:
    """As when a run on `mnist`, which has constants of its own, is resumed with the same files as `idx`."""
    given = datasets.load("generated", Path(), train_size=64, test_size=16)
    settings: dict[str, Any] = {"recipe": "classic", "model": "linear", "steps": 1, "out": tmp_path}
    library.train(**settings, dataset=replace(given, name="mnist", mean=0.1307, std=0.3081))
    settings |= {"steps": 2, "resume": "auto"}
    with pytest.raises(CheckpointError) as caught:
        library.train(**settings, dataset=replace(given, name="idx", mean=0.25, std=0.5))
    assert str(caught.value).endswith(
        ".pt was trained on the same images with different settings: mean 0.1307 there, 0.25 here, "
        "deviation 0.3081 there, 0.5 here; it was dataset='mnist', not idx"
    )
    there: dict[str, Any] = {**vars(given), "image_shape": [1, 28, 28], "sha256": ""}
    here = SimpleNamespace(**{**there, "image_shape": MNIST_SHAPE})
    assert data_differences(there, cast(Any, here)) is None
    here.name, here.class_names = "other", tuple("abcdefghij")
    assert data_differences(there, cast(Any, here)) is None
    here.class_names += ("more",)
    assert data_differences(there, cast(Any, here)) == (
        "the same images with different settings: number of classes 10 there, 11 here; "
        "it was --dataset generated, not other"
    )
    here.image_shape = (3, 32, 48)
    assert data_differences(there, cast(Any, here)) == (
        "images of 28 by 28, but here they are 48 wide and 32 high in colour"
    )
