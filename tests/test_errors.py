"""Failures with a cause outside of the program are told as such, with what to do."""

import errno

import pytest
import torch

from distributed_mnist.errors import described, explain, print_error

LONG = "a" * 300
CASES = {
    "a name too long": (
        OSError(errno.ENAMETOOLONG, "File name too long", LONG),
        2,
        "a: file name too long",
    ),
    "a folder without rights": (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        2,
        "x: permission denied",
    ),
    "open files": (
        OSError(errno.EMFILE, "Too many open files"),
        5,
        "raise the limit of open files (`ulimit -n`)",
    ),
    "processes": (
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        5,
        "(`ulimit -u`, or a",
    ),
    "threads": (RuntimeError("can't start new thread"), 5, "(`ulimit -u`, or a container's)"),
    "memory": (MemoryError(), 5, "not enough memory: free memory, or raise its limit"),
    "torch's memory": (
        RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        5,
        "not enough memory: free memory, or raise its limit",
    ),
    "a device's memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        5,
        "not enough memory on the device: use a smaller --batch-size",
    ),
    "closed output": (
        OSError(errno.EBADF, "Bad file descriptor"),
        6,
        "the output cannot be written: bad file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_causes_outside_of_the_program(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, text = CASES[case]
    assert print_error(error) == code
    message = capsys.readouterr().err
    assert text in message and "please report it" not in message
    assert len(message) < 300
    assert described(error)[1] == str(explain(error))  # as another rank tells it


def test_defects_stay_defects(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(KeyError("x")) == 1
    assert print_error(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) == 1
    assert capsys.readouterr().err.count("please report it") == 2
