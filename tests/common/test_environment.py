"""Environment variables of workers, and variables that bind threads to cores."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_mnist.cli import surroundings
from distributed_mnist.common import environment
from distributed_mnist.training import notices


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0-1")


def test_workers_are_not_bound_to_one_core() -> None:
    with environment.for_workers():
        assert environment.thread_binding() == []
        assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ["PYTHONHASHSEED"] == "0"  # a set of strings has the same order in each run
    assert environment.thread_binding() == ["OMP_PROC_BIND", "GOMP_CPU_AFFINITY"]


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", "a:")
    before = dict(os.environ)
    with environment.for_workers():
        assert os.environ["PYTHONPATH"].endswith("a")
    assert dict(os.environ) == before


def test_binding_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "FALSE")  # OpenMP then ignores the others
    assert environment.thread_binding() == []


def test_slowness_under_another_launcher_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(local_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(notices, "usable_cores", lambda: 1)
    (warning,) = notices.oversubscription_warnings(world, 1)
    assert warning.startswith("OMP_PROC_BIND and GOMP_CPU_AFFINITY may bind all processes to one core")
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    (warning,) = notices.oversubscription_warnings(world, 1)
    assert warning == "2 processes share 1 core: same answer, slower than --nproc 1"


def test_kernels_are_not_chosen_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    environment.order_additions()
    assert [os.environ[name] for name in names] == [":4096:8", "1"]
    assert not {*names} & environment.settings().keys()  # which are the user's own


def test_threads_that_wait_sleep_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of workers of a caller's process, whose own environment is not changed."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with environment.for_workers():
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment.wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    surroundings.prepare()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environment.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


_HEAP_FLAGS = """
import ctypes, re
from distributed_mnist.common import environment

environment.keep_memory()
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
middle = malloc(8 * 2**20) + 4 * 2**20  # the first pages of 4 KiB lie before those of 2 MiB
flags = ""
for line in open("/proc/self/smaps"):
    if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(area[1], 16) <= middle < int(area[2], 16)
    elif line.startswith("VmFlags") and inside:
        flags = line
print(flags)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_the_heap_gets_huge_pages() -> None:
    flags = subprocess.run(
        [sys.executable, "-c", _HEAP_FLAGS], capture_output=True, text=True, check=True
    ).stdout
    assert "hg" in flags.split(), flags
