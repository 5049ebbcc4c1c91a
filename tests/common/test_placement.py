"""The cores that a process may use."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributed_mnist.common import placement


@pytest.mark.parametrize(
    ("siblings", "allowed", "count"),
    [
        (["0,4", "1,5", "2,6", "3,7"] * 2, range(8), 4),  # two threads a core, as on most Intel processors
        (["0,4", "1,5", "2,6", "3,7"] * 2, (0, 4), 1),
        (["0-1", "0-1", "2", "3"], range(4), 3),  # large cores and small ones
        (["0", "1"], range(2), 2),
        (["0", "1"], range(4), 4),  # of two the files are missing
    ],
)
def test_threads_of_one_core_count_once(
    siblings: list[str], allowed: Sequence[int], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for thread, text in enumerate(siblings):
        (tmp_path / str(thread)).write_text(f"{text}\n")
    monkeypatch.setattr(placement, "_SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    monkeypatch.setattr(placement, "usable_cores", lambda: len(allowed))
    assert placement.physical_cores() == count
    monkeypatch.setattr(placement, "usable_cores", lambda: 1)  # a container's quota
    assert placement.physical_cores() == 1
