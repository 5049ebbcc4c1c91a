"""Ctrl-C while `train` runs: it saves, says how to resume, and leaves the caller's process as it was."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import nn

from distributed_mnist import train
from distributed_mnist.api.interrupts import StopOnInterrupt
from distributed_mnist.errors import Interrupted

SAVED = r"stopped by a signal after step \d+ of 40, checkpoint saved; resume with resume='auto', out='"


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_first_saves_and_the_second_stops_at_once(nproc: int, digits: Path, tmp_path: Path) -> None:
    ranks.server()
    caller, once, twice = os.getpid(), tmp_path / "once", tmp_path / "twice"

    class Net(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(784, classes), 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += self.training and len(images) > 2
            if self.calls == 20 and once.exists():
                once.unlink()
                os.kill(caller, signal.SIGINT)
            if self.calls == 20 and twice.exists():
                twice.unlink()
                raise KeyboardInterrupt
            return self.layer(images.flatten(1))

    settings: dict[str, Any] = {"recipe": "fast", "epochs": 15, "steps": 40, "device": "cpu", "model": Net}
    settings |= {"dataset": digits, "nproc": nproc, "out": tmp_path / "run", "checkpoint_every": 1}
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    once.touch()
    with pytest.raises(Interrupted, match=SAVED):
        train(**settings)
    twice.touch()
    with pytest.raises(KeyboardInterrupt):
        train(**settings, resume="auto")
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGINT)) == (threads, handler)
    resumed = train(**settings, resume="auto")
    assert (
        resumed.weights_sha256
        == train(**settings | {"out": tmp_path / "straight", "nproc": 1}).weights_sha256
    )


def test_before_there_is_anything_to_save_it_stops_at_once() -> None:
    with StopOnInterrupt() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not stop.requested()
    with StopOnInterrupt() as stop:
        stop.arm()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_callers_handler_and_other_threads_are_left_alone() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        with StopOnInterrupt() as stop:
            stop.arm()
            signal.raise_signal(signal.SIGINT)
        assert (received, stop.requested()) == ([signal.SIGINT], False)
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=lambda: StopOnInterrupt().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
