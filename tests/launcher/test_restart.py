"""A process dies or hangs while `dmnist train` runs: one line, a restart, and the same weights."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import paced
import pytest
from ranks import DMNIST, PATIENCE, Finished, Program, WarmProgram, events, processes, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"),
]

RECIPE = ("--recipe", "classic", "--model", "faulty_model:network", "--batch-size", 22, "--lr", 0.003)
FLAGS = (*RECIPE, "--epochs", 2, "--checkpoint-every", 10)
"""A hundred steps; slowed down, they take about five seconds."""
HANG = 5
"""Seconds; other processes on this host may delay a step for some of them."""
KILLED = r"rank {} \(pid {}\) was ended by SIGKILL \(out of memory, or by hand\)"
AGAIN = r"; restarting from the (last checkpoint|beginning)( \(restart \d+ of \d+ without a new one\))?"
RESUME = r"; (resume with --resume auto --out \S+|there is no checkpoint yet)"


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return train("--dataset", "idx", "--data", digits, *FLAGS, nproc=1, out=out)


class Run(WarmProgram):
    """`dmnist train` with these flags and variables; slow until `hurry()`."""

    def __init__(self, digits: Path, folder: Path, *flags: object, **variables: str) -> None:
        self.out = folder / "out"
        self._hurry = folder / "hurry"
        self.trouble = folder / "trouble"
        """Exists as soon as the model has begun to misbehave."""
        command = ["train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *FLAGS]
        own = {
            "PYTHONPATH": paced.python_path(),
            "SLOW_UNTIL": str(self._hurry),
            "TROUBLE_TOLD": str(self.trouble),
        }
        super().__init__([*DMNIST, *command, "--out", self.out, *flags], cwd=folder, **own, **variables)

    def hurry(self) -> None:
        """Let it run at full speed."""
        self._hurry.touch()

    def starts(self) -> list[dict[str, Any]]:
        """Return the `start` events so far: one for each group that trained."""
        return [event for event in events(self.out) if event["event"] == "start"]

    def under_way(self, groups: int = 1, steps: int = 12) -> list[int]:
        """Wait until the last of this many groups has trained this many steps; return its pids by rank."""

        def trains() -> bool:
            starts = self.starts()
            return len(starts) >= groups and last_step_of_last_group(self.out) >= starts[-1]["step"] + steps

        self.wait_for(trains, f"step {steps} of group {groups}")
        return [rank["pid"] for rank in self.starts()[-1]["ranks"]]

    def workers(self) -> list[int]:
        """Return the workers' pids, oldest first: the launcher's grandchildren."""
        alive = processes(self.pid)
        return sorted(pid for pid, parent in alive.items() if self.pid not in (pid, parent))

    def ends(self) -> Finished:
        """Wait for its end, and until no process is left."""
        ended = self.finish()
        deadline = time.monotonic() + PATIENCE
        while left := processes(self.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)  # looking costs time that they need
        assert "Traceback" not in ended.stderr, ended
        return ended


class FreshRun(Run):
    """The same with fresh interpreters, as a user starts it."""

    _start = Program._start


def last_step_of_last_group(out: Path) -> int:
    logged = events(out)
    begun = [place for place, event in enumerate(logged) if event["event"] == "start"]
    steps = [event["step"] for event in logged[begun[-1] :] if event["event"] == "steps"] if begun else []
    return max(steps, default=-1)


def lines(ended: Finished) -> list[str]:
    """Return the messages of the program and its ranks, without the notices of the run."""
    return [line for line in ended.stderr.splitlines() if "dmnist: " in line]


def assert_messages(ended: Finished, *patterns: str) -> None:
    """Check that there are exactly these messages, in this order."""
    found = lines(ended)
    assert len(found) == len(patterns), ended
    for line, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def assert_same_result(
    run: Run, ended: Finished, expected: dict[str, Any], groups: int | None = None
) -> None:
    """Check that the result equals that of a run without faults."""
    assert ended.code == 0, ended
    result = events(run.out)[-1]["result"]
    for name in ("weights_sha256", "samples_sha256", "data_sha256", "test_loss", "test_accuracy", "steps"):
        assert result[name] == expected[name], name
    assert recorded(run.out) == recorded(Path(expected["out"]))
    assert [path.name for path in run.out.rglob("*.part")] == []
    if groups is not None:
        assert len(run.starts()) == groups


def recorded(out: Path) -> dict[int, float]:
    """Return each step's loss; of a repeated step, the last one."""
    return {
        event["first_step"] + i: loss
        for event in events(out)
        if event["event"] == "steps"
        for i, loss in enumerate(event["losses"])
    }


# ---- A worker dies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "nproc"), [(0, 2), (1, 2), (0, 1)])
def test_one_rank_is_killed(rank: int, nproc: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    start = FreshRun if rank == 1 else Run
    with start(digits, tmp_path, "--nproc", nproc) as run:
        pid = run.under_way()[rank]
        os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    assert_messages(ended, "dmnist: " + KILLED.format(rank, pid) + AGAIN)
    assert_same_result(run, ended, undisturbed, groups=2)


def test_all_are_killed_at_once(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path, "--nproc", 3) as run:
        pids = run.under_way()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    assert_messages(ended, "dmnist: " + KILLED.format(r"\d", f"({'|'.join(map(str, pids))})") + AGAIN)
    assert_same_result(run, ended, undisturbed, groups=2)


def test_killed_twice(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path) as run:
        first = run.under_way()[1]
        os.kill(first, signal.SIGKILL)
        second = run.under_way(groups=2)[0]
        os.kill(second, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    assert_messages(ended, *("dmnist: " + KILLED.format(*who) + AGAIN for who in ((1, first), (0, second))))
    assert_same_result(run, ended, undisturbed, groups=3)


@pytest.mark.parametrize("rank", [1])
def test_killed_before_it_trained(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """At that moment the other rank may be in the rendezvous."""
    with Run(digits, tmp_path) as run:
        pid = run.wait_for(lambda: len(run.workers()) == 2 and run.workers(), "two workers")[rank]
        os.kill(pid, signal.SIGKILL)
        assert run.starts() == []
        run.hurry()
        ended = run.ends()
    assert_messages(ended, "dmnist: " + KILLED.format(rank, pid) + AGAIN)
    assert_same_result(run, ended, undisturbed, groups=1)


def test_killed_while_it_writes_a_checkpoint(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """The incomplete file is not used as a checkpoint, and is removed."""
    with Run(digits, tmp_path, "--checkpoint-every", 1) as run:
        pid = run.under_way()[0]
        checkpoints = run.out / "checkpoints"
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline
            if not list(checkpoints.glob("*.part")):
                continue
            os.kill(pid, signal.SIGSTOP)
            if list(checkpoints.glob("*.part")):  # and the process is stopped now, so it stays
                break
            os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    assert_messages(ended, "dmnist: " + KILLED.format(0, pid) + AGAIN)
    assert_same_result(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("rank", [1])
def test_killed_in_an_evaluation(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    trouble = {"TROUBLE": f"kill {rank} evaluate 1", "TROUBLE_ONCE": "yes"}  # after the first epoch
    with Run(digits, tmp_path, **trouble) as run:
        run.hurry()
        ended = run.ends()
    assert_messages(ended, "dmnist: " + KILLED.format(rank, r"\d+") + AGAIN)
    assert_same_result(run, ended, undisturbed, groups=2)


def test_it_gives_up(digits: Path, tmp_path: Path) -> None:
    """A model that always dies at the same step will do so again."""
    flags = ("--checkpoint-every", 1000, "--max-restarts", 2)
    with Run(digits, tmp_path, *flags, TROUBLE="kill 1 train 60") as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == 8
    died = "dmnist: " + KILLED.format(1, r"\d+")
    why = rf"; failure 3 in a row without a checkpoint \(--max-restarts 2\){RESUME}"
    assert_messages(ended, died + AGAIN, died + AGAIN, died + why)
    assert len(run.starts()) == 3
    assert not (run.out / "result.json").exists()


def test_it_does_not_give_up_while_there_is_progress(
    digits: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """Every group dies after its 35th step, and has saved a checkpoint before."""
    with Run(digits, tmp_path, "--max-restarts", 1, TROUBLE="kill 0 train 140") as run:
        run.hurry()
        ended = run.ends()
    assert len(run.starts()) >= 4
    assert_messages(ended, *["dmnist: " + KILLED.format(0, r"\d+") + AGAIN] * (len(run.starts()) - 1))
    assert_same_result(run, ended, undisturbed)


# ---- Errors that a restart cannot fix --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        ("nan 1 train 100", 7, r"dmnist: the loss is not finite at step \d+: .*last good checkpoint: .*"),
        (
            "raise 1 train 100",
            2,
            r"\[rank 1\] dmnist: --model faulty_model:network: step \d+: ArithmeticError: of the user's "
            r"own \(faulty_model.py:56: raise ArithmeticError.*\); resume with --resume auto --out .*",
        ),
    ],
)
def test_an_error_of_its_own(trouble: str, code: int, line: str, digits: Path, tmp_path: Path) -> None:
    with Run(digits, tmp_path, TROUBLE=trouble) as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == code
    assert_messages(ended, line)
    assert len(run.starts()) == 1


# ---- A worker hangs --------------------------------------------------------------------------------------

WAITED = rf"; rank \d waited \d+ s for it in an? [\w -]+, at step \d+ \(--hang-after {HANG}\)"
LOST = r"dmnist: the group lost a process" + AGAIN


@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_stopped(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Rank 0 is also the coordinator, which has the heartbeats."""
    with Run(digits, tmp_path, "--hang-after", HANG) as run:
        pid = run.under_way()[rank]
        os.kill(pid, signal.SIGSTOP)
        run.hurry()
        ended = run.ends()
    who = rf"rank {rank} \(pid {pid} on \S+\)"
    place = r"[a-z' ]+, step \d+"  # of the last heartbeat, which may be older than the first step
    if rank == 0:
        where = r"\(at 127.0.0.1 port \d+\)"
        gone = rf"is stopped or cannot be reached {where}: last heartbeat: {place}"
        assert_messages(ended, rf"\[rank 1\] dmnist: {who} {gone}{WAITED}", LOST)
    else:
        silent = rf"is stopped or cannot be reached: {place}, last heartbeat at \d\d:\d\d:\d\d"
        assert_messages(ended, rf"dmnist: {who} {silent}{WAITED}", LOST)
    assert_same_result(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("rank", [1])
def test_one_loops_in_a_users_model(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    trouble = {"TROUBLE": f"loop {rank} train 100", "TROUBLE_ONCE": "yes"}
    with Run(digits, tmp_path, "--hang-after", HANG, **trouble) as run:
        run.hurry()
        ended = run.ends()
    pid = run.starts()[0]["ranks"][rank]["pid"]
    who = rf"rank {rank} \(pid {pid} on \S+\)"
    does = rf"{who} has made no progress for \d+ s: training, step \d+, in faulty_model.py:\d+ trouble"
    assert_messages(ended, r"(\[rank 1\] )?dmnist: " + does + WAITED, LOST)
    assert lines(ended)[0].startswith("[rank 1]") == (rank == 0)
    assert_same_result(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("sync", ["tree", "ddp"])
def test_a_hang_that_comes_again(sync: str, digits: Path, tmp_path: Path) -> None:
    flags = ("--hang-after", HANG, "--max-restarts", 0, "--sync", sync)
    with Run(digits, tmp_path, *flags, TROUBLE="sleep 1 train 100") as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == 8
    does = (
        r"rank 1 \(.*\) has made no progress for \d+ s: training, step \d+, in faulty_model.py:\d+ trouble"
    )
    assert_messages(ended, "dmnist: " + does + WAITED, "dmnist: the group lost a process" + RESUME)


def test_all_are_stopped_for_a_while(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Ctrl-Z, a suspended job, a paused container: no rank is at fault."""
    with Run(digits, tmp_path, "--hang-after", HANG) as run:
        run.under_way()
        run.signal(signal.SIGSTOP, group=True)
        time.sleep(1.5 * HANG)  # not a wait for something: the suspension itself
        run.signal(signal.SIGCONT, group=True)
        run.hurry()
        ended = run.ends()
    assert_messages(ended)
    assert_same_result(run, ended, undisturbed, groups=1)


# ---- Signals meanwhile -----------------------------------------------------------------------------------

STILL_RUNNING = (
    r"dmnist: asked to stop, but still running after 1 s \(a long step, or a hang\): "
    r"nothing saved since the last checkpoint; resume with --resume auto --out \S+"
)
RANK_1 = r"\[rank 1\] "


@pytest.mark.parametrize(
    ("trouble", "lines"),
    [
        # The rank that hangs reports, and rank 0 for all others.
        ("loop 1 train 100", (STILL_RUNNING, RANK_1 + STILL_RUNNING)),
        ("sleep 0 train 100", (STILL_RUNNING,)),
    ],
)
def test_asked_to_stop_when_there_is_no_next_step(
    trouble: str, lines: tuple[str, ...], digits: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """Then it stops not at the next step, but within the time that a scheduler allows."""
    with Run(digits, tmp_path, TROUBLE=trouble, OBEY_SECONDS="1") as run:
        run.hurry()
        run.wait_for(run.trouble.exists, "the trouble")
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    assert_messages(ended, *lines)
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        assert_same_result(run, run.ends(), undisturbed, groups=2)


def test_asked_to_stop_when_rank_zero_cannot(digits: Path, tmp_path: Path) -> None:
    """Then another rank reports why the run ends."""
    with Run(digits, tmp_path, OBEY_SECONDS="1") as run:
        os.kill(run.under_way()[0], signal.SIGSTOP)
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    assert_messages(ended, RANK_1 + STILL_RUNNING)


def test_asked_to_stop_while_a_new_group_starts(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path) as run:
        pids = run.under_way()
        server = processes(run.pid)[pids[1]]
        os.kill(pids[1], signal.SIGKILL)

        def new_workers() -> bool:
            alive = [pid for pid, parent in processes(run.pid).items() if parent == server]
            return len(alive) == 2 and not {*alive} & {*pids}

        run.wait_for(new_workers, "new workers")
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    assert_messages(ended, "dmnist: " + KILLED.format(1, pids[1]) + AGAIN, r"dmnist: stopped by .*")
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        assert_same_result(run, run.ends(), undisturbed)


def test_asked_to_stop_in_the_moment_of_a_death(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Nothing is restarted then, no matter which of the two came first."""
    with Run(digits, tmp_path) as run:
        pid = run.under_way()[1]
        os.kill(pid, signal.SIGSTOP)
        run.signal(signal.SIGTERM)
        os.kill(pid, signal.SIGKILL)
        ended = run.ends()
    assert ended.code == 75
    assert "restarting from" not in ended.stderr
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        assert_same_result(run, run.ends(), undisturbed)


def test_the_server_of_the_workers_is_killed(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Their parent process. It is reported, and no training is lost."""
    with Run(digits, tmp_path) as run:
        pid = run.under_way()[0]
        parent = processes(run.pid)[pid]
        assert parent != run.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    found = [line for line in lines(ended) if "restarting from" in line]
    assert len(found) == 1, ended
    assert re.fullmatch("dmnist: the server that forks the processes was ended" + AGAIN, found[0])
    assert_same_result(run, ended, undisturbed)
