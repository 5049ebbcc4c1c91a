"""`dmnist train --detach` and `dmnist stop`."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import run_folders
from paced import Job
from ranks import DMNIST, WarmProgram, dmnist
from warm import here

from distributed_mnist.cli import detach, stop
from distributed_mnist.errors import OutputError, UsageError
from distributed_mnist.reporting.watch import Tail
from distributed_mnist.runs.lock import Holder, RunLock, holder_of, is_live


def words_for(job: Job, digits: Path, folder: Path) -> tuple[object, ...]:
    shutil.copytree(digits, folder / "data")
    return (*DMNIST, *job.words, "--out", job.out)


@pytest.mark.slow
def test_a_run_in_the_background_is_stopped_and_comes_to_the_same(
    digits: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    job = Job(tmp_path)
    words = words_for(job, digits, tmp_path)
    with WarmProgram(
        (*words, "--nproc", 2, "--detach", "--json"), cwd=tmp_path, **job.variables
    ) as program:
        background = program.finish().json()  # although the run goes on
    pid, log = background["pid"], Path(background["log"])
    try:
        assert os.getsid(pid) == pid
        assert log.parent == job.out
        started = psutil.Process(pid).create_time()
        assert holder_of(job.out) == Holder(pid, socket.gethostname(), round(started, 2))
        ended = here("stop", job.out)
        text = r"stopped after step \d+ of 100, checkpoint saved\nresume   dmnist train --resume auto --out"
        assert (ended.code, ended.stderr) == (0, "")
        assert re.match(text, ended.stdout)
        assert not is_live(job.out)
        assert "checkpoint saved; resume with --resume auto" in log.read_text()
    finally:
        if psutil.pid_exists(pid) and is_live(job.out):
            os.kill(pid, signal.SIGKILL)
    job.hurry()
    resumed = (*words, "--nproc", 1, "--resume", "auto", "--json")
    with WarmProgram(resumed, cwd=tmp_path, **job.variables) as program:
        assert program.finish().json()["weights_sha256"] == expected["weights_sha256"]
    finished = here("stop", job.out)
    assert finished.code == 2
    assert f"no run is in progress in {job.out}: it has finished" in finished.stderr


def test_what_keeps_a_run_from_starting_is_told_on_the_terminal(tmp_path: Path) -> None:
    words = (
        "train",
        "--dataset",
        "idx",
        "--data",
        tmp_path / "nowhere",
        "--out",
        tmp_path / "runs" / "out",
    )
    ended = dmnist(*words, "--device", "cpu", "--nproc", 1, "--detach", "--json")
    assert (ended.code, ended.stdout) == (3, "")
    assert re.fullmatch(r"dmnist: .*nowhere.*\n", ended.stderr)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pid {pid} on {host}, started 12.00", "its process cannot be seen from here"),
        ("pid {pid} on {host}", "is part of a Python program .*: stop it there"),
        ("pid {pid} on elsewhere, started 12.00", "on another host: type on elsewhere dmnist stop /"),
        ("pid 1 on {host}, started 12.00", "cannot be seen from here"),
        ("nothing that it knows", "does not say which process it is"),
    ],
)
def test_no_other_process_is_signalled(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is held, but its file does not name a process that can be stopped from here."""
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("signalled"))
    monkeypatch.setattr(stop, "_RESTART_SECONDS", 0.0)
    run_folders.write(tmp_path / "run")
    held = RunLock(tmp_path / "run", process=os.getpid())
    text = content.format(pid=os.getpid(), host=socket.gethostname())
    (tmp_path / "run" / ".lock").write_text(text)
    with pytest.raises(UsageError, match=message):
        stop.run(run=tmp_path / "run", timeout=1, as_json=False)
    held.release()


def test_a_run_that_has_stopped_or_never_was(tmp_path: Path) -> None:
    folder = run_folders.write(tmp_path / "run")
    told = [run_folders.start(0), {"event": "stop", "time": 1e9, "step": 7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    (folder / "result.json").unlink()
    for path, message in (
        (
            folder,
            r"no run is in progress in .*: it has stopped; resume with dmnist train --resume auto --out",
        ),
        (tmp_path, "is not a run"),
    ):
        with pytest.raises(UsageError, match=message):
            stop.run(run=path, timeout=1, as_json=False)


def test_the_start_of_another_run_in_the_folder_is_not_that_of_this_one(tmp_path: Path) -> None:
    """Two are started into one folder at the same moment. The second ends because it is in use."""
    folder = run_folders.write(tmp_path / "run")
    held = RunLock(folder, process=os.getpid())
    with subprocess.Popen(["sleep", "0.3"]) as second:
        assert detach._wait_for_start(second.pid, folder, Tail(folder)) == 0
    held.release()


def test_an_ensemble_is_stopped_also_between_two_members(tmp_path: Path) -> None:
    """Its launcher runs, but no member holds a lock yet."""
    done = run_folders.write(tmp_path / "seed-0")
    RunLock(done, process=os.getpid()).release()
    held: list[RunLock] = []
    begin = threading.Timer(0.3, lambda: held.append(RunLock(tmp_path / "seed-1", process=os.getpid())))
    begin.start()
    folder, holder = stop._wait_for_holder(tmp_path)
    assert (folder, holder.pid) == (tmp_path / "seed-1", os.getpid())
    begin.join()
    held[0].release()


def test_a_run_in_the_background_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match=r"--out .*out: no space left on device"):
        detach.detach(tmp_path / "out", tmp_path / "out", as_json=False)
    assert not list(tmp_path.iterdir())
