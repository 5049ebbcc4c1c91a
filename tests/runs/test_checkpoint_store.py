"""A run's folder: which checkpoints stay in it and are found again, and who may write to it."""

import errno
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_mnist.errors import OutputError
from distributed_mnist.runs import checkpoint_store
from distributed_mnist.runs.checkpoint import decode, encode
from distributed_mnist.runs.checkpoint_store import NullStore, RunStore
from distributed_mnist.runs.layout import checkpoints_in, newest_step, write_json
from distributed_mnist.runs.lock import RunLock


def pack(step: int) -> Callable[[], dict[str, Any]]:
    """Return a function that returns a checkpoint of some kilobytes."""
    return lambda: {
        "format": 1,
        "model": {"w": torch.full((4000,), float(step))},
        "optimizer": {},
        "step": step,
        "best_accuracy": 0.5,
        "samples_sha256": "ab" * 32,
        "totals": {"loss": 1.5, "correct": 3, "images": 8},
        "train_seconds": 0.5,
        "recipe": {},
        "dataset": {
            "name": "idx",
            "class_names": [],
            "image_shape": [1, 28, 28],
            "mean": 0.1,
            "std": 0.3,
            "sha256": "cd",
        },
        "steps_per_epoch": 9,
        "versions": {},
    }


def save(store: RunStore, step: int, *, best: bool = False) -> str | None:
    """Save a checkpoint and wait for it. Return the problem, if any."""
    store.save(pack(step), best=best)
    (saved,) = store.finished(wait=True)
    assert saved.step == step
    return saved.problem


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def file(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}.pt"


def silence(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def step_in(path: Path) -> int:
    return decode(path.read_bytes(), "file")["step"]


@contextmanager
def little_room() -> Iterator[None]:
    """Limit files to 1,000 bytes: a write then fails part-way with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    store = RunStore(tmp_path, keep)
    assert store.last_good() == "none"
    for step in (5, 10, 15, 100_000_000, 200_000_000):  # the last two are too long for their names
        assert save(store, step, best=step == 10) is None
        assert store.last_good() == str(file(tmp_path, step))
    kept = [5, 10, 15, 100_000_000, 200_000_000][-keep:]
    assert names(tmp_path) == sorted(["best.pt", *(file(tmp_path, step).name for step in kept)])
    assert checkpoints_in(tmp_path / "checkpoints") == [file(tmp_path, step) for step in kept]
    assert step_in(tmp_path / "checkpoints" / "best.pt") == 10
    assert [step_in(file(tmp_path, step)) for step in kept] == kept


def test_other_files_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    others = ["notes.txt", "step_1.pt.bak", "my_step_2.pt", "step_x.pt"]
    for name in others:
        (tmp_path / "checkpoints" / name).write_text("mine")
    store = RunStore(tmp_path, keep=1)
    save(store, 1)
    save(store, 2)
    assert names(tmp_path) == sorted([*others, file(tmp_path, 2).name])


def test_nothing_to_find(tmp_path: Path) -> None:
    assert RunStore(tmp_path, 3).newest(silence) is None
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_the_newest_is_found(tmp_path: Path) -> None:
    writer = RunStore(tmp_path, 3)
    for step in (9, 10, 11):
        save(writer, step, best=True)
    reader = RunStore(tmp_path, 3)
    found = reader.newest(silence)
    assert found is not None and found == (file(tmp_path, 11), encode(pack(11)()), 11)
    reader.resumed_from(str(found[0]), 11)
    assert reader.last_good() == str(file(tmp_path, 11))


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path: Path) -> None:
    writer = RunStore(tmp_path, 4)
    for step in (1, 2, 3, 4):
        save(writer, step)
    whole = file(tmp_path, 4).read_bytes()
    file(tmp_path, 4).write_bytes(whole[: len(whole) // 2])
    file(tmp_path, 3).write_bytes(b"")
    flipped = bytearray(file(tmp_path, 2).read_bytes())
    flipped[flipped.index(torch.full((9,), 2.0).numpy().tobytes()) + 3] ^= 1
    file(tmp_path, 2).write_bytes(flipped)
    said: list[str] = []
    found = RunStore(tmp_path, 4).newest(said.append)
    assert found is not None
    assert found[0] == file(tmp_path, 1)
    for step, text in zip((4, 3, 2), said, strict=True):
        assert text.startswith(f"{file(tmp_path, step)} is damaged")
        assert text.endswith("; trying the one before it")


def test_all_damaged(tmp_path: Path) -> None:
    save(RunStore(tmp_path, 3), 1)
    file(tmp_path, 1).write_bytes(b"torn")
    said: list[str] = []
    assert RunStore(tmp_path, 3).newest(said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_after_skipping_damaged_checkpoints_is_kept(tmp_path: Path, keep: int) -> None:
    """Damaged files of later steps must not cause newly saved ones to be pruned."""
    writer = RunStore(tmp_path, 3)
    for step in (10, 20, 30):
        save(writer, step)
    file(tmp_path, 30).write_bytes(b"torn")
    file(tmp_path, 20).write_bytes(b"torn")
    store = RunStore(tmp_path, keep)
    said: list[str] = []
    assert store.newest(said.append) is not None
    assert save(store, 12) is None
    assert Path(store.last_good()).exists()
    found = RunStore(tmp_path, keep).newest(said.append)
    assert found is not None
    assert found[0] == file(tmp_path, 12)


def test_a_full_disk_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path, keep=1)
    save(store, 1, best=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with little_room():
        problem = save(store, 2, best=True)
    assert problem == f"{file(tmp_path, 2)} could not be saved: file too large"
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    assert store.last_good() == str(file(tmp_path, 1))
    assert save(store, 3, best=True) is None  # and when there is room again, it is used
    assert names(tmp_path) == ["best.pt", file(tmp_path, 3).name]


def test_older_checkpoints_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is removed first, and the newest undamaged one never, whatever comes after it."""
    store = RunStore(tmp_path, keep=4)
    for step in (10, 20, 30, 40):
        save(store, step)
    file(tmp_path, 40).write_bytes(b"torn")
    room = 2
    really_write = checkpoint_store.write

    def write(path: Path, data: bytes) -> None:
        if len([*path.parent.iterdir()]) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        really_write(path, data)

    monkeypatch.setattr(checkpoint_store, "write", write)
    assert save(store, 50, best=True) is None
    assert names(tmp_path) == ["best.pt", file(tmp_path, 30).name, file(tmp_path, 50).name]
    assert save(store, 60) is None
    assert names(tmp_path) == ["best.pt", file(tmp_path, 50).name, file(tmp_path, 60).name]
    room = 1
    assert save(store, 70) == f"{file(tmp_path, 70)} could not be saved: no space left on device"
    assert names(tmp_path) == ["best.pt", file(tmp_path, 60).name]
    assert store.last_good() == str(file(tmp_path, 60))


def test_a_deleted_folder_is_created_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path, keep=1)
    (tmp_path / "checkpoints").rmdir()
    assert save(store, 1) is None
    assert names(tmp_path) == [file(tmp_path, 1).name]


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step_00000001.pt.0badcafe.part").write_bytes(b"half")
    RunStore(tmp_path, 3)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for make in (lambda: RunStore(tmp_path / "taken", 3), lambda: RunLock(tmp_path / "taken")):
        with pytest.raises(OutputError, match="taken"):
            make()


def test_the_null_store_writes_nothing() -> None:
    def unpacked() -> dict[str, Any]:
        raise AssertionError("pack() was called unnecessarily")

    store = NullStore()
    store.save(unpacked, best=True)
    assert store.finished(wait=True) == []
    assert not store.due()
    assert store.last_good() == "none"


def test_a_save_holds_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    """Training changes the same tensors while they are written."""
    store = RunStore(tmp_path, 3)
    content = pack(7)()
    store.save(lambda: content, best=False)
    content["model"]["w"].fill_(-1)
    content["totals"]["loss"] = 9.0
    store.finished(wait=True)
    written = decode(file(tmp_path, 7).read_bytes(), "file")
    assert written["model"]["w"].eq(7).all()
    assert written["totals"]["loss"] == 1.5


def test_all_saves_are_written_in_order(tmp_path: Path) -> None:
    store = RunStore(tmp_path, 2)
    for step in range(1, 6):
        store.save(pack(step), best=False)
    assert [saved.step for saved in store.finished(wait=True)] == [1, 2, 3, 4, 5]
    assert [step_in(path) for path in checkpoints_in(tmp_path / "checkpoints")] == [4, 5]
    assert newest_step(tmp_path) == 5
    assert newest_step(tmp_path / "nowhere") == -1


def test_a_run_that_went_back_does_not_resume_from_later_steps(tmp_path: Path) -> None:
    """A run resumes from an earlier checkpoint and dies before it saves one. It resumes there again."""
    writer = RunStore(tmp_path, 5)
    for step in (80, 160, 320):
        save(writer, step)
    again = RunStore(tmp_path, 5)
    again.resumed_from(str(file(tmp_path, 80)), 80)
    assert newest_step(tmp_path) == 80
    assert names(tmp_path) == [file(tmp_path, 80).name, *(f"step_00000{n}.pt.before" for n in (160, 320))]
    found = RunStore(tmp_path, 5).newest(silence)
    assert found is not None and found[2] == 80
    save(again, 96)
    assert newest_step(tmp_path) == 96


def test_copies_of_the_state_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is too slow for the checkpoints, training waits for it."""
    room = threading.Event()
    store = RunStore(tmp_path, 3, every_seconds=1e-9)
    written = store.write

    def slowly(path: Path, content: dict[str, Any], *, best: bool) -> None:
        assert room.wait(60)
        written(path, content, best=best)

    monkeypatch.setattr(store, "write", slowly)
    store.save(pack(1), best=False)
    assert not store.due()
    second = threading.Thread(target=store.save, args=(pack(2),), kwargs={"best": False})
    second.start()
    second.join(0.2)
    assert second.is_alive()
    room.set()
    second.join(60)
    assert [saved.step for saved in store.finished(wait=True)] == [1, 2]


def test_due_after_an_interval_in_seconds(tmp_path: Path) -> None:
    assert not RunStore(tmp_path, 1).due()  # never, if the interval is given in steps
    assert not RunStore(tmp_path, 1, every_seconds=3600).due()
    store = RunStore(tmp_path, 1, every_seconds=1e-9)
    assert store.due()
    store.save(pack(1), best=False)
    store.finished(wait=True)
    assert store.due()


HOLDER = """
import sys
from pathlib import Path
from distributed_mnist.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            for _ in range(2):  # an attempt does not release it
                with pytest.raises(OutputError) as caught:
                    RunLock(folder)
                said = str(caught.value)
                assert said.startswith(f"--out {folder} is in use by a live run (pid {holder.pid} on ")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    RunLock(folder).release()


def test_a_released_lock_can_be_taken(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.release()
    second = RunLock(tmp_path)
    second.release()


def test_abandon_deletes_a_new_folder_but_not_an_old_one(tmp_path: Path) -> None:
    RunLock(tmp_path / "new").abandon()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("mine")
    RunLock(tmp_path / "old").abandon()
    assert (tmp_path / "old" / "mine.txt").read_text() == "mine"


def test_json_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None, "ü"]})
    with pytest.raises(OutputError, match=r"a\.json: file too large$"), little_room():
        write_json(tmp_path / "a.json", {"a": "x" * 5000})
    assert (
        tmp_path / "a.json"
    ).read_bytes() == b'{\n  "a": [\n    1,\n    2.5,\n    null,\n    "\\u00fc"\n  ]\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
