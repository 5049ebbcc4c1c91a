"""A process that is asked to stop: heard at once whatever it does, obeyed in bounded time."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest
from ranks import PATIENCE

HEAD = """
import os, signal, sys, threading, time
from distributed_mnist import signals
from distributed_mnist.placement import Placement

signals.OBEY_SECONDS = 0.3

def say(text):
    print(text, flush=True)

def until(what):
    deadline = time.monotonic() + 30
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)

"""
EARLY = """
stop = signals.StopSignals(Placement())
try:
    say("ready")
    time.sleep(30)
except signals.StoppedEarly as early:
    say(early)
    os._exit(75)
"""
ARMED = """
stop = signals.StopSignals(Placement(rank=int(sys.argv[1]), size=2))
stop.arm()
"""


class Process:
    """A script that says what happens to it."""

    def __init__(self, process: "subprocess.Popen[str]", output: IO[str]) -> None:
        self._process, self._output = process, output

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def tells(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def says(self) -> str:
        return self._output.readline().strip()

    def ends(self) -> tuple[int, str, str]:
        """Its code, and what else it said and told."""
        stdout, stderr = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, stdout.strip(), stderr.strip()


@contextmanager
def script(text: str, *arguments: object) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(text), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            yield Process(process, process.stdout)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_there_is_anything_to_save(number: signal.Signals) -> None:
    with script(EARLY) as process:
        assert process.says() == "ready"
        process.signal(number)
        assert process.ends() == (
            75,
            f"stopped by {number.name} before there was anything to save",
            "",
        )


def test_a_signal_that_came_before_anybody_heard() -> None:
    """A launcher blocks them until now; none is lost."""
    blocked = """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        signals.StopSignals(Placement())
        until(lambda: False)
    except signals.StoppedEarly as early:
        say(early)
        os._exit(75)
    """
    with script(blocked) as process:
        assert process.ends() == (75, "stopped by SIGTERM before there was anything to save", "")


def test_no_failure_of_its_own_is_made_of_it() -> None:
    swallowed = """
    stop = signals.StopSignals(Placement())
    try:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: False)
        except Exception:
            say("taken for a failure")
    except BaseException as early:
        say(type(early).__name__)
        os._exit(0)
    """
    with script(swallowed) as process:
        assert process.ends() == (0, "StoppedEarly", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_then_it_is_a_question_that_the_loop_asks(number: signal.Signals) -> None:
    loop = """
    say(stop.requested())
    until(stop.requested)
    say(stop.requested())
    os._exit(75)
    """
    with script(ARMED + textwrap.dedent(loop), 0) as process:
        assert process.says() == "False"
        process.signal(number)
        assert process.ends() == (75, "True", "")


def test_ctrl_c_twice() -> None:
    twice = """
    try:
        say("ready")
        until(stop.requested)
        say("heard")
        time.sleep(30)
    except KeyboardInterrupt:
        say("at once")
        os._exit(130)
    """
    with script("signals.OBEY_SECONDS = 30\n" + ARMED + textwrap.dedent(twice), 0) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGINT)
        assert process.says() == "heard"
        process.signal(signal.SIGINT)
        assert process.ends() == (130, "at once", "")


def test_sigterm_twice_is_asked_once() -> None:
    twice = """
    say("ready")
    until(stop.requested)
    say("heard")
    until(lambda: False)
    """
    with script(ARMED + textwrap.dedent(twice), 0) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGTERM)
        assert process.says() == "heard"
        process.signal(signal.SIGTERM)
        assert process.ends()[0] == 75


def test_the_launchers_sigterm_and_one_ctrl_c_are_not_two() -> None:
    """A terminal sends Ctrl-C to all, and our launcher passes it on: in either order it is asked once."""
    both = """
    try:
        say("ready")
        until(stop.requested)
        say("heard")
        until(lambda: sys.stdin.readline() == "go on\\n")
        say("asked")
    except KeyboardInterrupt:
        say("at once")
    os._exit(75)
    """
    with script(ARMED + textwrap.dedent(both), 0) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGTERM)
        assert process.says() == "heard"
        process.signal(signal.SIGINT)
        process.tells("go on")
        assert process.ends() == (75, "asked", "")


STUCK = {
    "in Python": "while True: pass",
    "outside of Python": "import ctypes; ctypes.CDLL(None).sleep(30)",
    "for another": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


@pytest.mark.parametrize("how", STUCK)
def test_a_process_that_does_not_come_to_a_step_is_ended(how: str) -> None:
    with script(ARMED + 'say("ready")\nwhile True:\n    ' + STUCK[how], 0) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGTERM)
        code, stdout, stderr = process.ends()
    assert (code, stdout) == (75, "")
    assert stderr == (
        "dmnist: asked to stop, but not done after 0 s (a long step, or something hangs): "
        "a run goes on from its last checkpoint with --resume auto"
    )


def test_other_signals_mean_nothing() -> None:
    other = """
    signal.signal(signal.SIGUSR2, lambda *_: say("SIGUSR2"))
    say("ready")
    time.sleep(1)
    say(stop.requested())
    os._exit(0)
    """
    with script(ARMED + textwrap.dedent(other), 0) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGUSR2)
        assert process.ends() == (0, "SIGUSR2\nFalse", "")


ORPHAN = """
parent = os.getpid()
if os.fork() == 0:
    signals._WATCH_SECONDS = 0.05
    stop = signals.StopSignals(Placement())
    stop.arm()
    signals.end_with(parent)
    say("ready")
    until(stop.requested)
    say(stop.requested() and os.getppid() != parent)
    os._exit(0)
signal.pause()
"""


def test_a_process_whose_parent_is_gone_is_asked_to_stop() -> None:
    with script(ORPHAN) as process:
        assert process.says() == "ready"
        process.signal(signal.SIGKILL)
        assert process.says() == "True"
