"""Under a real mpirun: the same weights, and a doctor that knows where it is."""

import json
import shutil
from pathlib import Path

import pytest
from paced import assert_same
from ranks import DMNIST, run, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here (Debian's openmpi-bin)"),
]
# As root and with more ranks than cores Open MPI wants to be asked twice.
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n")


def test_mpirun(digits: Path, tmp_path: Path) -> None:
    words = ("--dataset", "idx", "--data", digits, "--recipe", "fast", "--steps", 5)
    command = (*MPIRUN, 3, *DMNIST, "train", "--device", "cpu", *words, "--out", tmp_path / "out", "--json")
    ended = run(command, cwd=tmp_path)
    alone = train(*words, nproc=1, out=tmp_path / "alone")
    assert_same(ended.json(), alone, world_size=3)


def test_the_doctor_under_mpirun(tmp_path: Path) -> None:
    words = ("doctor", "--device", "cpu", "--dataset", "generated", "--out", tmp_path, "--json")
    told = json.loads(run((*MPIRUN, 2, *DMNIST, *words), cwd=tmp_path).stdout)
    assert (told["launcher"], told["world_size"]) == ("mpirun", 2)
    assert {one["name"]: one["verdict"] for one in told["findings"]}["collectives"] == "good"
