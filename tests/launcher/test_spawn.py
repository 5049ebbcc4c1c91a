"""Our own launcher: how exit codes are combined, and when processes are restarted."""

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
AGAIN = r"; restarting from the (last checkpoint|beginning)( \(restart \d+ of \d+ without a new one\))?"
FLAGS = "--resume auto --out here"
RESUME = f"; resume with {FLAGS}"
LONG = 30.0

Action = int | str


def act(placement: Placement, listener: socket.socket | None, plan: dict[str, Any]) -> int:
    """One process of a plan: exit with a code, kill itself, or wait. Files of earlier groups count them."""
    folder = Path(plan["folder"])
    group = sum(1 for _ in folder.glob(f"{placement.rank}.*"))
    about = {"pid": os.getpid(), "launcher_id": placement.launcher_id, "listens": listener is not None}
    (folder / f"{placement.rank}.{group}").write_text(json.dumps(about))
    groups = plan["groups"]
    action: Action = groups[min(group, len(groups) - 1)][placement.rank]
    if action in ("ignore", "nearly done"):
        for number in spawn.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if action == "obey":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    # Not before: another rank may already have caused a signal.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    if isinstance(action, int):
        return action
    if action == "leave":
        os._exit(0)
    if action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    if action == "print":
        print("one line\nand another, not ended", end="", flush=True)
        print(" é\udcff", file=sys.stderr, flush=True)
        return 0
    (folder / f"waits.{placement.rank}.{group}").touch()
    if action == "nearly done":
        time.sleep(0.5)
        return 0
    deadline = time.monotonic() + LONG  # the launcher ends a process that waits, or it ends by itself
    while time.monotonic() < deadline:
        time.sleep(0.01)
    return 99


@pytest.fixture(autouse=True)
def impatient_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_POLL_SECONDS", 0.1)
    server()


class Launched:
    """The processes of a plan: a list of actions per group, by rank; the last also for later groups."""

    def __init__(self, folder: Path, *groups: list[Action]) -> None:
        self.folder, self._groups = folder, groups

    def run(self, restarts: Restarts | None = None) -> int:
        plan = {"folder": str(self.folder), "groups": self._groups}
        with pytest.MonkeyPatch.context() as patch:
            # On a busy machine a process that ends by itself needs time; one that waits is killed soon.
            waits = any(action in ("wait", "ignore") for group in self._groups for action in group)
            patch.setattr(spawn, "GRACE_SECONDS", 0.5 if waits else LONG)
            code = spawn.spawn(len(self._groups[0]), [Task("test_spawn:act", plan, restarts)])
        for about in self.processes():
            assert not Path(f"/proc/{about['pid']}").exists(), about
        return code

    def processes(self) -> list[dict[str, Any]]:
        """All processes that ran, by rank and group."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("[0-9]*"))]

    def groups(self) -> int:
        """The number of groups that ran."""
        return len(list(self.folder.glob("0.*")))


def assert_messages(capsys: pytest.CaptureFixture[str], *patterns: str) -> None:
    """Check that standard error has exactly these lines."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch("dmnist: " + pattern, line), line


def no_progress(limit: int) -> Restarts:
    return Restarts(limit, lambda: 5, FLAGS)


# ---- Exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "code"),
    [
        ([0], 0),
        ([0, 0, 0], 0),
        ([3, 8, 8], 3),  # one with its own error, and those that lost it
        ([8, 8, 4], 4),
        ([75, 75], 75),
        ([75, 8], 75),
        ([8, 75, 2], 2),
        ([0, 1], 1),
    ],
)
def test_exit_codes_are_combined(
    actions: list[Action], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a group that ended by itself is not restarted."""
    launched = Launched(tmp_path, actions)
    assert launched.run(no_progress(3)) == code
    assert launched.groups() == 1
    assert_messages(capsys)


@pytest.mark.parametrize("actions", [["leave"], [8, "leave", 0]])
def test_a_process_that_leaves_is_lost(
    actions: list[Action], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model or a library that ends the process with code 0 has not finished the work."""
    launched = Launched(tmp_path, actions)
    assert launched.run(Restarts(0, lambda: -1, FLAGS)) == 8
    rank = actions.index("leave")
    who = (
        rf"rank {rank} \(pid \d+\) ended itself before its work was finished \(the model or a library has "
    )
    assert_messages(capsys, rf"{who}called exit\); there is no checkpoint yet")


def test_rank_zero_gets_the_listener(tmp_path: Path) -> None:
    launched = Launched(tmp_path, [0, 0, 0])
    launched.run()
    assert [about["listens"] for about in launched.processes()] == [True, False, False]


def test_the_other_processes_are_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched = Launched(tmp_path, ["wait", 6, "ignore"])
    assert launched.run(no_progress(3)) == 6
    assert_messages(capsys)


def test_output_has_the_rank_in_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Launched(tmp_path, [0, "print", "print"]).run() == 0
    lines = capsys.readouterr().err.splitlines()
    for rank in (1, 2):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine[0] == f"[rank {rank}] one line"
        assert mine[1].startswith(f"[rank {rank}] and another, not ended")
    assert len(lines) == 4


# ---- Restarts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "how", "more"),
    [(0, "SIGKILL", MEMORY), (1, "SIGKILL", MEMORY), (0, "SIGSEGV", ""), (1, "SIGABRT", "")],
)
def test_one_dies(
    victim: int, how: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first: list[Action] = ["wait", "wait"]
    first[victim] = how
    launched = Launched(tmp_path, first, [0, 0])
    assert launched.run(no_progress(3)) == 0
    assert launched.groups() == 2
    assert_messages(capsys, NAME.format(victim, how) + more + AGAIN)


def test_a_restarted_group_has_the_same_launcher_id(tmp_path: Path) -> None:
    launched = Launched(tmp_path, ["SIGKILL", 8], [8, "SIGKILL"], [0, 0])
    assert launched.run(no_progress(3)) == 0
    assert launched.groups() == 3
    launcher_ids = {about["launcher_id"] for about in launched.processes()}
    assert len(launcher_ids) == 1
    other = Launched(tmp_path, [0, 0])
    other.run()
    assert len({about["launcher_id"] for about in other.processes()}) == 2


def test_a_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks that diagnosed it exit with 8. The hanging one is killed, but not reported as the cause."""
    launched = Launched(tmp_path, [8, "ignore", 8], [0, 0, 0])
    assert launched.run(no_progress(1)) == 0
    assert_messages(capsys, r"the group lost a process" + AGAIN)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_it_gives_up(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched = Launched(tmp_path, ["SIGKILL", 8])
    assert launched.run(no_progress(limit)) == 8
    assert launched.groups() == limit + 1
    died = NAME.format(0, "SIGKILL") + MEMORY
    limited = rf" \(--max-restarts {limit}\)"
    often = f"; failure {limit + 1} in a row without a checkpoint{limited}" if limit else ""
    assert_messages(capsys, *[died + AGAIN] * limit, died + often + RESUME)


def test_without_restarts_it_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Launched(tmp_path, ["SIGKILL", 8]).run() == 8
    assert_messages(capsys, NAME.format(0, "SIGKILL") + MEMORY)


def test_progress_resets_the_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most two failures in a row without progress: 1, 1, progress, 1, 1, progress."""
    reached = iter([0, 0, 7, 7, 7, 9, 9, 9, 9])
    launched = Launched(tmp_path, *[["SIGKILL", 8]] * 5, [0, 0])
    assert launched.run(Restarts(3, lambda: next(reached), FLAGS)) == 0
    assert launched.groups() == 6
    assert_messages(capsys, *[NAME.format(0, "SIGKILL") + MEMORY + AGAIN] * 5)


def test_going_back_is_not_progress(tmp_path: Path) -> None:
    """The newest checkpoint was damaged and is gone. There is no progress until its step is passed."""
    reached = iter([90, 60, 75, 90, 90])
    launched = Launched(tmp_path, ["SIGKILL", 8])
    assert launched.run(Restarts(2, lambda: next(reached), FLAGS)) == 8
    assert launched.groups() == 3


# ---- Asked to stop ---------------------------------------------------------------------------------------


def when(path: Path, then: Callable[[], None]) -> Any:
    """Start a thread that waits for a file and then calls a function."""

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
    """Signals that the launcher did not handle; without this they would end the process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in spawn.SIGNALS}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded(
    number: int, heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), number))
    launched = Launched(tmp_path, ["obey", "obey"])
    assert launched.run(no_progress(3)) == 75
    thread.join()
    assert heard == []
    assert_messages(capsys)


def test_no_restart_after_a_signal(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that dies of the signal is lost, but the group was stopping anyway."""
    thread = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), signal.SIGTERM))
    launched = Launched(tmp_path, ["obey", "wait"])
    assert launched.run(no_progress(3)) == 75
    thread.join()
    assert launched.groups() == 1
    assert heard == []
    assert_messages(capsys, NAME.format(1, "SIGTERM") + f" while the run was stopping{RESUME}")


def test_ctrl_c_twice_while_one_hangs(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who presses it twice does not want to wait for processes that ignore it."""
    noticed, on_signal = threading.Event(), spawn._StopRequest.on_signal

    def note(stop: Any, number: int, frame: Any) -> None:
        on_signal(stop, number, frame)
        noticed.set()

    monkeypatch.setattr(spawn._StopRequest, "on_signal", note)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        noticed.wait(LONG)  # two at once would be one signal
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(tmp_path / "waits.1.0", twice)
    launched = Launched(tmp_path, ["ignore", "ignore"])
    assert launched.run(no_progress(3)) == 130
    thread.join()
    assert launched.groups() == 1
    assert heard == []
    assert_messages(capsys, "stopped at once; nothing saved since the last checkpoint")


def test_a_group_that_ignores_signals_is_killed(
    heard: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "OBEY_SECONDS", 0.2)
    thread = when(tmp_path / "waits.1.0", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert Launched(tmp_path, ["ignore", "ignore"]).run(no_progress(3)) == 75
    thread.join()
    assert_messages(capsys, "rank 0, 1 did not stop in time: killed")


def test_asked_to_stop_between_two_groups(heard: list[int], tmp_path: Path) -> None:
    """One has ended, and the next has not started."""
    looked = []

    def reached() -> int:
        looked.append(1)
        if len(looked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    launched = Launched(tmp_path, ["SIGKILL", 8], ["obey", "obey"])
    assert launched.run(Restarts(3, reached, FLAGS)) == 75
    assert heard == []


def test_variables_that_bind_all_processes_to_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_PLACES", "cores")
    assert Launched(tmp_path, [0, 0]).run() == 0
    assert_messages(capsys, "OMP_PLACES not used: all processes would be bound to one core")


def test_the_previous_handlers_are_restored(heard: list[int], tmp_path: Path) -> None:
    Launched(tmp_path, ["SIGKILL", 8], [0, 0]).run(no_progress(1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*spawn.SIGNALS} == set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def blocked(placement: Placement, listener: socket.socket | None, plan: dict[str, Any]) -> int:
    """Exit with the number of signals that are blocked."""
    return len(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(spawn.SIGNALS))


def _without_blocked_signals(alive: Any) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    child.run_worker("test_spawn:blocked", Placement(), None, None, alive, None)


def test_a_worker_blocks_signals_if_its_server_does_not() -> None:
    context = server()
    alive, held = context.Pipe(duplex=False)
    worker = context.Process(target=_without_blocked_signals, args=(alive,))
    worker.start()
    worker.join(LONG)
    held.close()
    assert worker.exitcode == len(spawn.SIGNALS)


# ---- Several tasks, and signals between them -------------------------------------------------------------


def _listen() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)
    time.sleep(LONG)


def test_workers_that_start_after_a_signal_receive_it() -> None:
    stop = spawn._StopRequest()
    worker = server().Process(target=_listen)
    worker.start()
    stop.on_signal(signal.SIGUSR1, None)
    assert stop.requested()
    stop.forward_to([worker])
    worker.join(LONG)
    assert worker.exitcode == -signal.SIGUSR1


def test_one_task_after_the_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    plans = [{"folder": str(f), "groups": [[code]]} for f, code in zip(folders, (0, 3, 0), strict=True)]
    assert spawn.spawn(1, [Task("test_spawn:act", plan) for plan in plans]) == 3
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1, 0]


def test_a_signal_too_late_for_one_task_stops_before_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [{"folder": str(tmp_path), "groups": [[action]]} for action in ("nearly done", 0)]
    tasks = [Task("test_spawn:act", plan, no_progress(1)) for plan in plans]

    def ask() -> None:
        deadline = time.monotonic() + LONG
        while not (tmp_path / "waits.0.0").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert spawn.spawn(1, tasks) == 75
    thread.join()
    assert len(list(tmp_path.glob("0.*"))) == 1
    assert_messages(capsys, "stopped before all was done" + RESUME)
