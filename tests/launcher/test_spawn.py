"""Our own launcher: how the ends of its processes become one end, and when they are started again."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import server

from distributed_mnist.common.placement import Placement
from distributed_mnist.launcher import spawn
from distributed_mnist.launcher import worker as child
from distributed_mnist.launcher.spawn import Restarts, Task

NAME = r"rank {} \(pid \d+\) was ended by {}"
MEMORY = r" \(out of memory, or by hand\)"
AGAIN = r"; starting again from the (last checkpoint|beginning)( \(restart \d+ of \d+ without a new one\))?"
FLAGS = "--resume auto --out here"
GONE_ON = f"; go on with {FLAGS}"
LONG = 30.0

Act = int | str


def act(placement: Placement, listener: socket.socket | None, plan: dict[str, Any]) -> int:
    """What a process does: end with a code, kill itself, or wait. Earlier groups of the plan left files."""
    folder = Path(plan["folder"])
    group = sum(1 for _ in folder.glob(f"{placement.rank}.*"))
    about = {"pid": os.getpid(), "starter": placement.starter, "listens": listener is not None}
    (folder / f"{placement.rank}.{group}").write_text(json.dumps(about))
    groups = plan["groups"]
    does: Act = groups[min(group, len(groups) - 1)][placement.rank]
    if does in ("deaf", "nearly done"):
        for number in spawn.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if does == "obey":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    # Only now: another rank may have asked for a signal already.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    if isinstance(does, int):
        return does
    if does.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, does))
    if does == "print":
        print("one line\nand another, not ended", end="", flush=True)
        print(" é\udcff", file=sys.stderr, flush=True)
        return 0
    (folder / f"waits.{placement.rank}.{group}").touch()
    if does == "nearly done":
        time.sleep(0.5)
        return 0
    deadline = time.monotonic() + LONG  # what waits is ended by the launcher, or else by itself
    while time.monotonic() < deadline:
        time.sleep(0.01)
    return 99


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "GRACE_SECONDS", 0.5)
    server()


class Launched:
    """The processes of a plan: one list of acts a group, by rank; the last is that of all later groups."""

    def __init__(self, folder: Path, *groups: list[Act]) -> None:
        self.folder, self._groups = folder, groups

    def run(self, restarts: Restarts | None = None) -> int:
        plan = {"folder": str(self.folder), "groups": self._groups}
        code = spawn.spawn(len(self._groups[0]), [Task("test_spawn:act", plan, restarts)])
        for about in self.processes():
            assert not Path(f"/proc/{about['pid']}").exists(), about
        return code

    def processes(self) -> list[dict[str, Any]]:
        """All that ran, by rank and group."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("[0-9]*"))]

    def groups(self) -> int:
        """How many groups there were."""
        return len(list(self.folder.glob("0.*")))


def told(capsys: pytest.CaptureFixture[str], *patterns: str) -> None:
    """Exactly these lines on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch("dmnist: " + pattern, line), line


def no_progress(limit: int) -> Restarts:
    return Restarts(limit, lambda: 5, FLAGS)


# ---- One end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acts", "code"),
    [
        ([0], 0),
        ([0, 0, 0], 0),
        ([3, 8, 8], 3),  # an error of its own, and those who lost it
        ([8, 8, 4], 4),
        ([75, 75], 75),
        ([75, 8], 75),
        ([8, 75, 2], 2),
        ([0, 1], 1),
    ],
)
def test_many_ends_are_one(
    acts: list[Act], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is started again that ended by itself."""
    launched = Launched(tmp_path, acts)
    assert launched.run(no_progress(3)) == code
    assert launched.groups() == 1
    told(capsys)


def test_rank_zero_is_given_the_meeting_place(tmp_path: Path) -> None:
    launched = Launched(tmp_path, [0, 0, 0])
    launched.run()
    assert [about["listens"] for about in launched.processes()] == [True, False, False]


def test_the_others_do_not_wait_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched = Launched(tmp_path, ["wait", 6, "deaf"])
    assert launched.run(no_progress(3)) == 6
    told(capsys)


def test_what_they_print_has_their_rank_in_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Launched(tmp_path, [0, "print", "print"]).run() == 0
    lines = capsys.readouterr().err.splitlines()
    for rank in (1, 2):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine[0] == f"[rank {rank}] one line"
        assert mine[1].startswith(f"[rank {rank}] and another, not ended")
    assert len(lines) == 4


# ---- Started again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("how", "more"), [("SIGKILL", MEMORY), ("SIGSEGV", ""), ("SIGABRT", "")])
def test_one_dies(
    victim: int, how: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first: list[Act] = ["wait", "wait"]
    first[victim] = how
    launched = Launched(tmp_path, first, [0, 0])
    assert launched.run(no_progress(3)) == 0
    assert launched.groups() == 2
    told(capsys, NAME.format(victim, how) + more + AGAIN)


def test_a_new_group_knows_its_launcher(tmp_path: Path) -> None:
    launched = Launched(tmp_path, ["SIGKILL", 8], [8, "SIGKILL"], [0, 0])
    assert launched.run(no_progress(3)) == 0
    assert launched.groups() == 3
    starters = {about["starter"] for about in launched.processes()}
    assert len(starters) == 1
    other = Launched(tmp_path, [0, 0])
    other.run()
    assert len({about["starter"] for about in other.processes()}) == 2


def test_a_hang_that_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those who found it end with 8; the one that hangs is ended, and is not who is told of."""
    launched = Launched(tmp_path, [8, "deaf", 8], [0, 0, 0])
    assert launched.run(no_progress(1)) == 0
    told(capsys, r"the group fell apart" + AGAIN)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_it_gives_up(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched = Launched(tmp_path, ["SIGKILL", 8])
    assert launched.run(no_progress(limit)) == 8
    assert launched.groups() == limit + 1
    died = NAME.format(0, "SIGKILL") + MEMORY
    limited = rf" \(--max-restarts {limit}\)"
    often = f"; failure {limit + 1} in a row without a checkpoint{limited}" if limit else ""
    told(capsys, *[died + AGAIN] * limit, died + often + GONE_ON)


def test_without_restarts_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Launched(tmp_path, ["SIGKILL", 8]).run() == 8
    told(capsys, NAME.format(0, "SIGKILL") + MEMORY)


def test_getting_further_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most two in a row without: 1, 1, then further, and again 1, 1 and further."""
    reached = iter([0, 0, 7, 7, 7, 9, 9, 9, 9])
    launched = Launched(tmp_path, *[["SIGKILL", 8]] * 5, [0, 0])
    assert launched.run(Restarts(3, lambda: next(reached), FLAGS)) == 0
    assert launched.groups() == 6
    told(capsys, *[NAME.format(0, "SIGKILL") + MEMORY + AGAIN] * 5)


def test_going_back_is_not_getting_further(tmp_path: Path) -> None:
    """The newest checkpoint was damaged and is gone: until it is passed nothing was gained."""
    reached = iter([90, 60, 75, 90, 90])
    launched = Launched(tmp_path, ["SIGKILL", 8])
    assert launched.run(Restarts(2, lambda: next(reached), FLAGS)) == 8
    assert launched.groups() == 3


# ---- Asked to stop ---------------------------------------------------------------------------------------


def when(path: Path, then: Callable[[], None]) -> Any:
    """A thread that waits for a file and does something then."""
    import threading

    def watch() -> None:
        deadline = time.monotonic() + LONG
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture
def heard() -> Any:
    """Signals that the launcher did not take for itself; without it they would end this process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in spawn.SIGNALS}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(
    number: int, heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), number))
    launched = Launched(tmp_path, ["obey", "obey"])
    assert launched.run(no_progress(3)) == 75
    asking.join()
    assert heard == []
    told(capsys)


def test_asked_to_stop_nothing_is_started_again(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that dies of the signal is lost, but the group was to end."""
    asking = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), signal.SIGTERM))
    launched = Launched(tmp_path, ["obey", "wait"])
    assert launched.run(no_progress(3)) == 75
    asking.join()
    assert launched.groups() == 1
    assert heard == []
    told(capsys, NAME.format(1, "SIGTERM") + f" while it was to stop{GONE_ON}")


def test_ctrl_c_twice_while_one_hangs(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever presses it twice does not want to wait for those who do not listen."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # a person; two at once would be one signal
        os.kill(os.getpid(), signal.SIGINT)

    asking = when(tmp_path / "waits.1.0", twice)
    launched = Launched(tmp_path, ["deaf", "deaf"])
    assert launched.run(no_progress(3)) == 130
    asking.join()
    assert launched.groups() == 1
    assert heard == []
    told(capsys, "stopped at once; nothing saved since the last checkpoint")


def test_a_deaf_group_is_ended_in_the_end(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "OBEY_SECONDS", 0.5)
    asking = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert Launched(tmp_path, ["deaf", "deaf"]).run(no_progress(3)) == 75
    asking.join()
    told(capsys, "rank 0, 1 did not obey, and was ended")


def test_asked_to_stop_between_two_groups(heard: list[int], tmp_path: Path) -> None:
    """One has ended, the next is not there yet."""
    looked = []

    def reached() -> int:
        looked.append(1)
        if len(looked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    launched = Launched(tmp_path, ["SIGKILL", 8], ["obey", "obey"])
    assert launched.run(Restarts(3, reached, FLAGS)) == 75
    assert heard == []


def test_the_handlers_of_before_are_back(heard: list[int], tmp_path: Path) -> None:
    Launched(tmp_path, ["SIGKILL", 8], [0, 0]).run(no_progress(1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*spawn.SIGNALS} == set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def blocked(placement: Placement, listener: socket.socket | None, plan: dict[str, Any]) -> int:
    """Ends with the number of our signals that wait."""
    return len(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(spawn.SIGNALS))


def _born_listening(alive: Any) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    child.work("test_spawn:blocked", Placement(), None, None, alive, None)


def test_a_worker_of_a_server_that_lets_signals_through_keeps_them_for_later() -> None:
    context = server()
    alive, held = context.Pipe(duplex=False)
    worker = context.Process(target=_born_listening, args=(alive,))
    worker.start()
    worker.join(LONG)
    held.close()
    assert worker.exitcode == len(spawn.SIGNALS)


# ---- Several works, and asked to stop when nobody is there to be told ------------------------------------


def _listen() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    time.sleep(LONG)


def test_who_comes_after_a_signal_is_told_of_it() -> None:
    stop = spawn._Stop()
    worker = server().Process(target=_listen)
    worker.start()
    stop.pass_on(signal.SIGUSR1, None)
    assert stop.asked()
    stop.take([worker])
    worker.join(LONG)
    assert worker.exitcode == -signal.SIGUSR1


def test_one_work_after_the_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    plans = [{"folder": str(f), "groups": [[code]]} for f, code in zip(folders, (0, 3, 0), strict=True)]
    assert spawn.spawn(1, [Task("test_spawn:act", plan) for plan in plans]) == 3
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1, 0]


def test_a_stop_too_late_for_one_work_stops_before_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [{"folder": str(tmp_path), "groups": [[does]]} for does in ("nearly done", 0)]
    tasks = [Task("test_spawn:act", plan, no_progress(1)) for plan in plans]

    def ask() -> None:
        deadline = time.monotonic() + LONG
        while not (tmp_path / "waits.0.0").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    assert spawn.spawn(1, tasks) == 75
    asking.join()
    assert len(list(tmp_path.glob("0.*"))) == 1
    told(capsys, "stopped before all was done" + GONE_ON)
