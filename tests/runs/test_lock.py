"""Who may write to a run's folder when several launchers start a run in it at the same time."""

import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distributed_mnist import train
from distributed_mnist.errors import OutputError
from distributed_mnist.runs import lock
from distributed_mnist.runs.layout import checkpoint_path
from distributed_mnist.runs.lock import RunLock
from distributed_mnist.runs.record import read


def instead_of_flock(monkeypatch: pytest.MonkeyPatch, flock: Callable[[Any, int], None]) -> None:
    names = {name: getattr(fcntl, name) for name in ("LOCK_EX", "LOCK_NB", "LOCK_SH")}
    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=flock, **names))


def meanwhile(monkeypatch: pytest.MonkeyPatch, others: Callable[[], None]) -> None:
    """Let `others()` happen while the next lock is being taken."""
    pending = [others]

    def flock(file: Any, operation: int) -> None:
        if pending:
            pending.pop()()
        fcntl.flock(file, operation)

    instead_of_flock(monkeypatch, flock)


def test_a_refused_launcher_deletes_no_run_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock was slow, and the other one has trained in the folder that it had made."""
    folder = tmp_path / "run"
    checkpoint = checkpoint_path(folder / "checkpoints", 7)

    def train() -> None:
        other = RunLock(folder)
        checkpoint.parent.mkdir()
        for path in (checkpoint, folder / "config.json", folder / "metrics.jsonl", folder / ".group"):
            path.write_text("the other's")
        other.release()

    meanwhile(monkeypatch, train)
    RunLock(folder).abandon()
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", ".group", "checkpoints", "config.json", "metrics.jsonl"}
    assert checkpoint.read_text() == "the other's"


def test_only_what_the_run_has_written_is_deleted(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in (".group", "config.json", "metrics.jsonl", "log.txt"):
        (tmp_path / "run" / name).write_text("")
    held.abandon()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "log.txt"}


def test_what_cannot_be_deleted_stays_and_the_lock_is_released(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run")
    (tmp_path / "run" / "config.json").mkdir()
    held.abandon()
    RunLock(tmp_path / "run").release()


def test_a_lock_on_a_deleted_file_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, held = tmp_path / "run", []
    first = RunLock(folder)

    def exchange() -> None:
        first.abandon()
        held.append(RunLock(folder))

    meanwhile(monkeypatch, exchange)
    with pytest.raises(OutputError, match=r"is in use by a live run \(pid "):
        RunLock(folder)
    held[0].release()


def test_launchers_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two at once, and the one run that is finished stays."""
    rng, problems = random.Random(0), []
    holders, finished = threading.Semaphore(1), threading.Event()
    folder = tmp_path / "run"
    monkeypatch.setattr(lock, "_PROBE_SECONDS", 0.002)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.001)

    def flock(file: Any, operation: int) -> None:
        time.sleep(rng.choice((0, 0.001, 0.003)))
        fcntl.flock(file, operation)
        time.sleep(rng.choice((0, 0.001)))

    def launch() -> None:
        for number in range(25):
            try:
                held = RunLock(folder)
            except OutputError:
                continue
            if not holders.acquire(blocking=False):
                problems.append("two hold the lock")
                return
            if finished.is_set() and not (folder / "weights").exists():
                problems.append("a finished run is gone")
            if number >= 10 and not finished.is_set():
                (folder / "weights").write_text("")
                finished.set()
            holders.release()
            held.abandon()

    instead_of_flock(monkeypatch, flock)
    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert finished.is_set()
    assert (folder / "weights").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    instead_of_flock(monkeypatch, flock)
    held = RunLock(tmp_path / "run")
    reason = os.strerror(number).lower()
    assert held.note is not None
    assert held.note.startswith(f"the file system of {tmp_path / 'run'} has no locks ({reason}): nothing ")
    assert not lock.is_live(tmp_path / "run")
    held.abandon()
    assert (tmp_path / "run").is_dir()  # another process may use it


def test_another_failure_to_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    instead_of_flock(monkeypatch, flock)
    with pytest.raises(OutputError, match=r"^--out .*run cannot be locked: input/output error$"):
        RunLock(tmp_path / "run")


def test_a_run_goes_on_without_locks_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    instead_of_flock(monkeypatch, flock)
    sizes: dict[str, Any] = {"train_size": 64, "test_size": 16}
    train(model="linear", steps=2, dataset="generated", out=tmp_path / "run", **sizes)
    notices = [event["text"] for event in read(tmp_path / "run").events if event["event"] == "notice"]
    assert any("has no locks (function not implemented)" in text for text in notices)
