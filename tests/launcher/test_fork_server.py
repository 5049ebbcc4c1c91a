"""The server that forks the workers: where its socket is, and what is said if it cannot be started."""

import os
import signal
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
from ranks import run_ranks

from distributed_mnist.distributed.world import World
from distributed_mnist.errors import LaunchError
from distributed_mnist.launcher import fork_server


def test_a_long_path_of_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with fork_server._folder_for_sockets():
        assert len(tempfile.gettempdir()) <= 70
    assert tempfile.gettempdir() == str(long)


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    with fork_server._folder_for_sockets():
        assert os.access(str(tempfile.tempdir), os.W_OK)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(LaunchError, match=r"no folder for temporary files .*: set TMPDIR to one"):
        fork_server.start_server()


def test_a_server_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EOFError

    monkeypatch.setattr(forkserver, "ensure_running", fail)
    with pytest.raises(
        LaunchError, match="processes cannot be started: the server that forks them has ended"
    ):
        fork_server.start_server()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(fork_server.SIGNALS)


def is_preloaded(world: World) -> bool:
    return "preloaded" in sys.modules


def test_the_server_that_tests_use_is_warm() -> None:
    """Otherwise multiprocessing says nothing, and each process of a test takes longer."""
    assert run_ranks(is_preloaded, 1) == [True]
