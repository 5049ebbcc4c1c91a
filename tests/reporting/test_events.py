"""The file of a run's events, on a disk that is full for a while."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from distributed_mnist.reporting import events
from distributed_mnist.reporting.events import JsonLines


class FullDisk:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self._file.close()


def opened(path: Path, room: int) -> tuple[JsonLines, FullDisk, list[str]]:
    said: list[str] = []
    sink = JsonLines(path, said.append)
    disk = FullDisk(sink._file, room)
    sink._file = disk  # type: ignore[assignment]
    return sink, disk, said


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 1, 100, 150])
def test_the_record_goes_on_when_there_is_room_again(room: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink, disk, said = opened(path, room)
    for number in range(10):
        sink.log("notice", number=number)
    assert len(said) == 1
    assert said[0].startswith(f"{path} cannot be written now (no space left on device); ")
    disk.room = 1 << 20
    sink.log("notice", number=10)
    assert numbers(path) == list(range(11))
    disk.room = 0
    sink.log("notice", number=11)
    disk.room = 1 << 20
    sink.close()
    assert numbers(path) == list(range(12))
    assert len(said) == 1


def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink, _, said = opened(path, 70)
    for number in range(10):
        sink.log("notice", number=number)
    sink.close()
    complete = path.read_text().count("\n")
    assert said[1:] == [f"{path} lacks {10 - complete} events, which could not be written"]
    JsonLines(path, said.append).close()  # removes the unfinished line
    assert numbers(path) == list(range(complete))


def test_the_memory_of_a_long_wait_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest events are kept, and the line that was begun is completed."""
    monkeypatch.setattr(events, "_MAX_WAITING_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    sink, disk, said = opened(path, 10)
    for number in range(1000):
        sink.log("notice", number=number)
        assert sum(map(len, sink._waiting)) == sink._waiting_bytes <= 1000
    disk.room = 1 << 20
    sink.log("notice", number=1000)
    sink.close()
    found = numbers(path)
    assert found[0] == 0
    assert found[1:] == list(range(1000 - len(found) + 2, 1001))
    assert len(found) > 10
    assert said[1:] == [f"{path} lacks {1001 - len(found)} events, which could not be written"]
