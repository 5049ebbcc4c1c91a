"""Signals that ask a process to stop: noticed at once, and obeyed in bounded time."""

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
from distributed_mnist.common.placement import Placement
from distributed_mnist.launcher import signals

signals.OBEY_SECONDS = 30  # on a busy machine the tests' next step may come late

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
DEFAULT = """
for number in (signal.SIGHUP, signal.SIGQUIT):  # the tests themselves may run with these ignored
    signal.signal(number, signal.SIG_DFL)
"""
SOON = "signals.OBEY_SECONDS = 0.3\n"
ARMED = """
stop = signals.StopSignals(Placement(rank=int(sys.argv[1]), size=2))
stop.arm()
"""


class Process:
    """A script that prints what happens to it."""

    def __init__(self, process: "subprocess.Popen[str]", output: IO[str]) -> None:
        self._process, self._output = process, output

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def write_line(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def read_line(self) -> str:
        return self._output.readline().strip()

    def finish(self) -> tuple[int, str, str]:
        """Return its exit code, and the rest of its output and errors."""
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_is_anything_to_save(number: signal.Signals) -> None:
    with script(EARLY) as process:
        assert process.read_line() == "ready"
        process.signal(number)
        assert process.finish() == (
            75,
            f"stopped by {number.name} before there was anything to save",
            "",
        )


def test_every_signal_that_asks_to_stop() -> None:
    each = """
    for number in signals.SIGNALS:
        if os.fork() == 0:
            stop = signals.StopSignals(Placement())
            stop.arm()
            before = stop.requested()
            os.kill(os.getpid(), number)
            os._exit(75 if stop.requested() and not before else 1)
        say(f"{number.name} {os.waitstatus_to_exitcode(os.wait()[1])}")
    """
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGXCPU")
    with script(DEFAULT + textwrap.dedent(each)) as process:
        assert process.finish() == (0, "\n".join(f"{name} 75" for name in names), "")


def test_what_is_ignored_at_the_start_stays_ignored() -> None:
    """As with `nohup`: neither a run that is under way nor one that begins is stopped."""
    ignored = """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    os.kill(os.getpid(), signal.SIGHUP)
    stop = signals.StopSignals(Placement())
    stop.arm()
    os.kill(os.getpid(), signal.SIGHUP)
    say(stop.requested())
    os.kill(os.getpid(), signal.SIGQUIT)
    say(stop.requested())
    os._exit(75)
    """
    with script(DEFAULT + textwrap.dedent(ignored)) as process:
        assert process.finish() == (75, "False\nTrue", "")


def test_a_signal_before_the_handlers_are_installed() -> None:
    """A launcher blocks signals until then; none is lost."""
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
        assert process.finish() == (75, "stopped by SIGTERM before there was anything to save", "")


def test_except_exception_does_not_catch_it() -> None:
    swallowed = """
    stop = signals.StopSignals(Placement())
    try:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: False)
        except Exception:
            say("caught as a failure")
    except BaseException as early:
        say(type(early).__name__)
        os._exit(0)
    """
    with script(swallowed) as process:
        assert process.finish() == (0, "StoppedEarly", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_once_armed(number: signal.Signals) -> None:
    loop = """
    say(stop.requested())
    until(stop.requested)
    say(stop.requested())
    os._exit(75)
    """
    with script(ARMED + textwrap.dedent(loop), 0) as process:
        assert process.read_line() == "False"
        process.signal(number)
        assert process.finish() == (75, "True", "")


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
    with script(ARMED + textwrap.dedent(twice), 0) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGINT)
        assert process.read_line() == "heard"
        process.signal(signal.SIGINT)
        assert process.finish() == (130, "at once", "")


def test_sigterm_twice_counts_once() -> None:
    twice = """
    say("ready")
    until(stop.requested)
    say("heard")
    until(lambda: False)
    """
    with script(SOON + ARMED + textwrap.dedent(twice), 0) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGTERM)
        assert process.read_line() == "heard"
        process.signal(signal.SIGTERM)
        assert process.finish()[0] == 75


def test_the_launchers_sigterm_and_ctrl_c_count_once() -> None:
    """A terminal sends Ctrl-C to all, and our launcher forwards it. In either order it counts once."""
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
        assert process.read_line() == "ready"
        process.signal(signal.SIGTERM)
        assert process.read_line() == "heard"
        process.signal(signal.SIGINT)
        process.write_line("go on")
        assert process.finish() == (75, "asked", "")


STUCK = {
    "in Python": "while True: pass",
    "outside of Python": "import ctypes; ctypes.CDLL(None).sleep(30)",
    "for a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


@pytest.mark.parametrize("how", STUCK)
def test_a_process_that_reaches_no_sync_point_is_ended(how: str) -> None:
    with script(SOON + ARMED + 'say("ready")\nwhile True:\n    ' + STUCK[how], 0) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGTERM)
        code, stdout, stderr = process.finish()
    assert (code, stdout) == (75, "")
    assert stderr == (
        "dmnist: asked to stop, but still running after 0 s (a long step, or a hang): "
        "nothing saved since the last checkpoint; resume with --resume auto"
    )


def test_other_signals_have_no_effect() -> None:
    other = """
    came = []
    signal.signal(signal.SIGALRM, lambda *_: came.append("SIGALRM"))
    say("ready")
    until(lambda: came)
    time.sleep(0.5)  # longer than OBEY_SECONDS
    say(*came)
    say(stop.requested())
    os._exit(0)
    """
    with script(SOON + ARMED + textwrap.dedent(other), 0) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGALRM)
        assert process.finish() == (0, "SIGALRM\nFalse", "")


ORPHAN = """
parent = os.getpid()
if os.fork() == 0:
    signals._POLL_SECONDS = 0.05
    stop = signals.StopSignals(Placement())
    stop.arm()
    signals.stop_with_parent(parent)
    say("ready")
    until(stop.requested)
    say(stop.requested() and os.getppid() != parent)
    os._exit(0)
signal.pause()
"""


def test_a_process_stops_when_its_parent_has_ended() -> None:
    with script(ORPHAN) as process:
        assert process.read_line() == "ready"
        process.signal(signal.SIGKILL)
        assert process.read_line() == "True"
