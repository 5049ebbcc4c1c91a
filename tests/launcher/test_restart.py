"""A process dies or hangs while `dmnist train` runs: said in a line, started again, the same answer."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import paced
import pytest
from ranks import DMNIST, PATIENCE, Finished, Program, events, processes, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"),
]

STEPS = 200
"""Of two epochs; slowed down, about five seconds."""
RECIPE = ("--recipe", "classic", "--model", "faulty_model:network", "--batch-size", 11, "--lr", 0.003)
FLAGS = (*RECIPE, "--epochs", 2, "--checkpoint-every", 15)
HANG = 3
"""Seconds; other processes of this host may get in the way for one or two."""
KILLED = r"rank {} \(pid {}\) was ended by SIGKILL \(out of memory, or by hand\)"
AGAIN = r"; starting again from the (last checkpoint|beginning)( \(restart \d+ of \d+ without a new one\))?"
GONE_ON = r"; (go on with --resume auto --out \S+|there is no checkpoint yet)"


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return train("--dataset", "idx", "--data", digits, *FLAGS, nproc=1, out=out)


class Run(Program):
    """A fresh `dmnist train` with more flags and variables; slow until `hurry()`."""

    def __init__(self, digits: Path, folder: Path, *flags: object, **variables: str) -> None:
        self.out = folder / "out"
        self._hurry = folder / "hurry"
        self.trouble = folder / "trouble"
        """There when the model has begun to make trouble."""
        words = ["train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits, *FLAGS]
        own = {
            "PYTHONPATH": paced.python_path(),
            "SLOW_UNTIL": str(self._hurry),
            "TROUBLE_TOLD": str(self.trouble),
        }
        super().__init__([*DMNIST, *words, "--out", self.out, *flags], cwd=folder, **own, **variables)

    def hurry(self) -> None:
        """Let it finish."""
        self._hurry.touch()

    def starts(self) -> list[dict[str, Any]]:
        """The `start` events so far: one for each group that trained."""
        return [event for event in events(self.out) if event["event"] == "start"]

    def under_way(self, groups: int = 1, steps: int = 20) -> list[int]:
        """Wait for so many groups, of which the last has trained so many steps; its pids by rank."""

        def trains() -> bool:
            starts = self.starts()
            return len(starts) >= groups and last_step_of_last_group(self.out) >= starts[-1]["step"] + steps

        self.wait_for(trains, f"step {steps} of group {groups}")
        return [rank["pid"] for rank in self.starts()[-1]["ranks"]]

    def workers(self) -> list[int]:
        """The workers' pids, oldest first: the launcher's grandchildren, once there are all of two."""
        alive = processes(self.pid)
        return sorted(pid for pid, parent in alive.items() if parent not in (self.pid, os.getpid()))

    def ends(self) -> Finished:
        """Its end, and no process is left."""
        ended = self.finish()
        deadline = time.monotonic() + PATIENCE
        while left := processes(self.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        assert "Traceback" not in ended.stderr, ended
        return ended


def last_step_of_last_group(out: Path) -> int:
    told = events(out)
    begun = [place for place, event in enumerate(told) if event["event"] == "start"]
    steps = [event["step"] for event in told[begun[-1] :] if event["event"] == "steps"] if begun else []
    return max(steps, default=-1)


def lines(ended: Finished) -> list[str]:
    """What the program and its ranks told of themselves: not the notices of the run."""
    return [line for line in ended.stderr.splitlines() if "dmnist: " in line]


def told(ended: Finished, *patterns: str) -> None:
    """Exactly these lines, in this order."""
    found = lines(ended)
    assert len(found) == len(patterns), ended
    for line, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def same(run: Run, ended: Finished, expected: dict[str, Any], groups: int | None = None) -> None:
    """The answer is that of a run that nothing happened to."""
    assert ended.code == 0, ended
    result = events(run.out)[-1]["result"]
    for name in ("weights_sha256", "samples_sha256", "data_sha256", "test_loss", "test_accuracy", "steps"):
        assert result[name] == expected[name], name
    assert recorded(run.out) == recorded(Path(expected["out"]))
    assert [path.name for path in run.out.rglob("*.part")] == []
    if groups is not None:
        assert len(run.starts()) == groups


def recorded(out: Path) -> dict[int, float]:
    """Each step's loss; a step that was repeated counts as the last time."""
    return {
        event["first_step"] + i: loss
        for event in events(out)
        if event["event"] == "steps"
        for i, loss in enumerate(event["losses"])
    }


# ---- A worker dies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "nproc"), [(0, 2), (1, 2), (0, 1)])
def test_one_is_killed(rank: int, nproc: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path, "--nproc", nproc) as run:
        pid = run.under_way()[rank]
        os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    told(ended, "dmnist: " + KILLED.format(rank, pid) + AGAIN)
    same(run, ended, undisturbed, groups=2)


def test_all_are_killed_at_once(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path, "--nproc", 3) as run:
        pids = run.under_way()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    told(ended, "dmnist: " + KILLED.format(r"\d", f"({'|'.join(map(str, pids))})") + AGAIN)
    same(run, ended, undisturbed, groups=2)


def test_killed_twice(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path) as run:
        first = run.under_way()[1]
        os.kill(first, signal.SIGKILL)
        second = run.under_way(groups=2)[0]
        os.kill(second, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    told(ended, *("dmnist: " + KILLED.format(*who) + AGAIN for who in ((1, first), (0, second))))
    same(run, ended, undisturbed, groups=3)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_before_it_trained(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """At that moment the other may be on its way to it."""
    with Run(digits, tmp_path) as run:
        pid = run.wait_for(lambda: len(run.workers()) == 2 and run.workers(), "two workers")[rank]
        os.kill(pid, signal.SIGKILL)
        assert run.starts() == []
        run.hurry()
        ended = run.ends()
    told(ended, "dmnist: " + KILLED.format(rank, pid) + AGAIN)
    same(run, ended, undisturbed, groups=1)


def test_killed_while_it_writes_a_checkpoint(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """What it had written of it is not taken for one, and is cleared away."""
    with Run(digits, tmp_path, "--checkpoint-every", 1) as run:
        pid = run.under_way()[0]
        checkpoints = run.out / "checkpoints"
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline
            if not list(checkpoints.glob("*.part")):
                continue
            os.kill(pid, signal.SIGSTOP)
            if list(checkpoints.glob("*.part")):  # and it stays there
                break
            os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    told(ended, "dmnist: " + KILLED.format(0, pid) + AGAIN)
    same(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_in_an_evaluation(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    trouble = {"TROUBLE": f"kill {rank} evaluate 1", "TROUBLE_ONCE": "yes"}  # after the first epoch
    with Run(digits, tmp_path, **trouble) as run:
        run.hurry()
        ended = run.ends()
    told(ended, "dmnist: " + KILLED.format(rank, r"\d+") + AGAIN)
    same(run, ended, undisturbed, groups=2)


def test_it_gives_up(digits: Path, tmp_path: Path) -> None:
    """A model that always dies at the same place will do so again."""
    flags = ("--checkpoint-every", 1000, "--max-restarts", 2)
    with Run(digits, tmp_path, *flags, TROUBLE="kill 1 train 60") as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == 8
    died = "dmnist: " + KILLED.format(1, r"\d+")
    why = rf"; failure 3 in a row without a checkpoint \(--max-restarts 2\){GONE_ON}"
    told(ended, died + AGAIN, died + AGAIN, died + why)
    assert len(run.starts()) == 3
    assert not (run.out / "result.json").exists()


def test_it_does_not_give_up_while_it_gets_further(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Every group dies after its 60th step, having saved something."""
    with Run(digits, tmp_path, "--max-restarts", 1, TROUBLE="kill 0 train 240") as run:
        run.hurry()
        ended = run.ends()
    assert len(run.starts()) >= 4
    told(ended, *["dmnist: " + KILLED.format(0, r"\d+") + AGAIN] * (len(run.starts()) - 1))
    same(run, ended, undisturbed)


# ---- What does not get better by starting again ----------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        ("nan 1 train 100", 7, r"dmnist: the loss is not finite at step \d+: .*last good checkpoint: .*"),
        (
            "raise 1 train 100",
            1,
            r"\[rank 1\] dmnist: a defect, please report it: ArithmeticError: of the user's own .*",
        ),
    ],
)
def test_an_error_of_its_own(trouble: str, code: int, line: str, digits: Path, tmp_path: Path) -> None:
    with Run(digits, tmp_path, TROUBLE=trouble) as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == code
    told(ended, line)
    assert len(run.starts()) == 1


# ---- A worker hangs --------------------------------------------------------------------------------------

WAITED = rf"; rank \d waited \d+ s for it in an? [\w ]+, at step \d+ \(--hang-after {HANG}\)"
LOST = r"dmnist: the group fell apart" + AGAIN


@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_stopped(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Rank 0 also serves the store through which they know of each other."""
    with Run(digits, tmp_path, "--hang-after", HANG) as run:
        pid = run.under_way()[rank]
        os.kill(pid, signal.SIGSTOP)
        run.hurry()
        ended = run.ends()
    who = rf"rank {rank} \(pid {pid} on \S+\)"
    place = r"training, step \d+"
    if rank == 0:
        store = r"\(its store at 127.0.0.1 port \d+\)"
        gone = rf"is stopped or cannot be reached {store}: last heard of while {place}"
        told(ended, rf"\[rank 1\] dmnist: {who} {gone}{WAITED}", LOST)
    else:
        silent = rf"is stopped or cannot be reached: {place}, last sign of life at \d\d:\d\d:\d\d"
        told(ended, rf"dmnist: {who} {silent}{WAITED}", LOST)
    same(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_loops_in_a_users_model(rank: int, digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    trouble = {"TROUBLE": f"loop {rank} train 100", "TROUBLE_ONCE": "yes"}
    with Run(digits, tmp_path, "--hang-after", HANG, **trouble) as run:
        run.hurry()
        ended = run.ends()
    pid = run.starts()[0]["ranks"][rank]["pid"]
    who = rf"rank {rank} \(pid {pid} on \S+\)"
    does = rf"{who} does not go on: training, step \d+ for \d+ s in troubled.py:\d+ trouble"
    told(ended, r"(\[rank 1\] )?dmnist: " + does + WAITED, LOST)
    assert lines(ended)[0].startswith("[rank 1]") == (rank == 0)
    same(run, ended, undisturbed, groups=2)


@pytest.mark.parametrize("sync", ["tree", "ddp"])
def test_a_hang_that_comes_again(sync: str, digits: Path, tmp_path: Path) -> None:
    flags = ("--hang-after", HANG, "--max-restarts", 0, "--sync", sync)
    with Run(digits, tmp_path, *flags, TROUBLE="loop 1 train 100") as run:
        run.hurry()
        ended = run.ends()
    assert ended.code == 8
    does = r"rank 1 \(.*\) does not go on: training, step \d+ for \d+ s in troubled.py:\d+ trouble"
    told(ended, "dmnist: " + does + WAITED, "dmnist: the group fell apart" + GONE_ON)


def test_all_are_stopped_for_a_while(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Ctrl-Z, a suspended job, a paused container: nobody is to blame."""
    with Run(digits, tmp_path, "--hang-after", HANG) as run:
        run.under_way()
        run.signal(signal.SIGSTOP, group=True)
        time.sleep(2 * HANG)  # this is what happens to it
        run.signal(signal.SIGCONT, group=True)
        run.hurry()
        ended = run.ends()
    told(ended)
    same(run, ended, undisturbed, groups=1)


# ---- Asked to stop meanwhile -----------------------------------------------------------------------------

IN_VAIN = (
    r"dmnist: asked to stop, but not done after 1 s \(a long step, or something hangs\): "
    r"a run goes on from its last checkpoint with --resume auto --out \S+"
)
RANK_1 = r"\[rank 1\] "


@pytest.mark.parametrize(
    ("trouble", "lines"),
    [
        ("loop 1 train 100", (IN_VAIN, RANK_1 + IN_VAIN)),  # who hangs, and who tells for all
        ("sleep 0 train 100", (IN_VAIN,)),
    ],
)
def test_asked_to_stop_when_there_is_no_next_step(
    trouble: str, lines: tuple[str, ...], digits: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """Not at the next step then, but in the time that a scheduler grants."""
    with Run(digits, tmp_path, TROUBLE=trouble, OBEY_SECONDS="1") as run:
        run.hurry()
        run.wait_for(run.trouble.exists, "the trouble")
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    told(ended, *lines)
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        same(run, run.ends(), undisturbed, groups=2)


def test_asked_to_stop_when_rank_zero_cannot(digits: Path, tmp_path: Path) -> None:
    """Then another says why it ends."""
    with Run(digits, tmp_path, OBEY_SECONDS="1") as run:
        os.kill(run.under_way()[0], signal.SIGSTOP)
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    told(ended, RANK_1 + IN_VAIN)


def test_asked_to_stop_while_a_new_group_starts(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    with Run(digits, tmp_path) as run:
        pids = run.under_way()
        os.kill(pids[1], signal.SIGKILL)
        run.wait_for(lambda: len(run.workers()) == 2 and not {*run.workers()} & {*pids}, "new workers")
        run.signal(signal.SIGTERM)
        ended = run.ends()
    assert ended.code == 75
    told(ended, "dmnist: " + KILLED.format(1, pids[1]) + AGAIN, r"dmnist: stopped by .*")
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        same(run, run.ends(), undisturbed)


def test_asked_to_stop_in_the_moment_of_a_death(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Then nothing is started again, and no matter which of the two came first."""
    with Run(digits, tmp_path) as run:
        pid = run.under_way()[1]
        os.kill(pid, signal.SIGSTOP)
        run.signal(signal.SIGTERM)
        os.kill(pid, signal.SIGKILL)
        ended = run.ends()
    assert ended.code == 75
    assert "starting again" not in ended.stderr
    with Run(digits, tmp_path, "--resume", "auto") as run:
        run.hurry()
        same(run, run.ends(), undisturbed)


def test_the_server_of_the_workers_is_killed(digits: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Their parent, which nobody looks for. It is said, and what was trained is not lost."""
    with Run(digits, tmp_path) as run:
        pid = run.under_way()[0]
        parent = processes(run.pid)[pid]
        assert parent != run.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
        run.hurry()
        ended = run.ends()
    found = [line for line in lines(ended) if "starting again" in line]
    assert len(found) == 1, ended
    assert re.fullmatch("dmnist: the server that the processes are forked from was ended" + AGAIN, found[0])
    same(run, ended, undisturbed)
