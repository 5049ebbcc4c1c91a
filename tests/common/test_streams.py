"""Standard output and standard error that are closed, full, or of another encoding."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from ranks import DMNIST, WarmProgram

from distributed_mnist.common.streams import try_to_write


def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        assert not try_to_write(full, "text")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
        assert try_to_write(full, "text")


def test_text_that_cannot_be_encoded() -> None:
    code = "from distributed_mnist.common.streams import prepare_streams as p; p(); print('\\u65e5')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\u65e5\n"


def test_training_goes_on_without_standard_output(digits: Path, tmp_path: Path) -> None:
    flags = ("--dataset", "idx", "--data", digits, "--recipe", "classic", "--epochs", 1, "--nproc", 2)
    command = (*DMNIST, "train", *flags, "--device", "cpu", "--out", tmp_path / "out")
    with WarmProgram(command, partial(os.close, 1)) as program:
        done = program.finish()
    assert (done.code, done.stdout) == (0, "")
    assert done.stderr == "dmnist: no further output is shown (bad file descriptor); the run continues\n"
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] > 0


def _close_standard_error(*words: str) -> None:
    os.close(2)
    sys.argv[:] = words  # as in a fresh program


def test_an_error_without_standard_error() -> None:
    command = (*DMNIST, "evaluate", "nothing", "--json")
    with WarmProgram(command, partial(_close_standard_error, *command)) as program:
        done = program.finish()
    assert done.code == 4
    assert json.loads(done.stdout) == {"error": "nothing: no such file or directory", "exit_code": 4}


def test_a_result_without_standard_output() -> None:
    with WarmProgram((*DMNIST, "--version"), partial(os.close, 1)) as program:
        done = program.finish()
    assert (done.code, done.stderr) == (6, "dmnist: the output cannot be written: bad file descriptor\n")
