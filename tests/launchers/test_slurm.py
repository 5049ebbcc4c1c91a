"""On a real Slurm: the same weights from srun, and from a batch job stopped, killed and requeued."""

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paced
import pytest
import slurm as bench
from ranks import DMNIST, PATIENCE, REPOSITORY, Program, environment, events, last_step, train
from slurm import Job, Slurm

SBATCH = REPOSITORY / "deploy" / "slurm" / "train.sbatch"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if why := bench.missing():
        pytest.skip(why)
    with bench.cluster() as running:
        yield running


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def starts(out: Path) -> list[int]:
    """The steps at which the run was started, the first time and again."""
    return [event["step"] for event in events(out) if event["event"] == "start"]


def saved(out: Path) -> list[int]:
    """The steps of its checkpoints."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*.pt"))


# ---- The batch file --------------------------------------------------------------------------------------


class Batch:
    """A job of the batch file with one task on each node. It takes its time, with `hurry` until its first
    attempt has ended."""

    def __init__(self, slurm: Slurm, digits: Path, folder: Path, *options: str, hurry: bool) -> None:
        words = (
            *options,
            "--nodes=2",
            "--ntasks-per-node=1",
            SBATCH,
            "--device",
            "cpu",
            *paced.flags(digits),
        )
        variables = {"PACED_UNTIL": str(folder / "hurry"), "PYTHONPATH": paced.python_path()}
        self.job: Job = slurm.submit(*words, cwd=folder, **variables)
        self.out = folder / "runs" / f"slurm-{self.job.number}"
        if hurry:
            (folder / "hurry").symlink_to(self.out / "attempts")  # which the batch file writes then

    def under_way(self, attempt: int = 1) -> None:
        def saves() -> bool:
            begun = starts(self.out)
            return len(begun) == attempt and bool(saved(self.out)) and saved(self.out)[-1] > begun[-1]

        self.job.wait_for(saves, f"a checkpoint of attempt {attempt}")


def grace(batch: Batch) -> None:
    """What Slurm sends to the tasks alone when the job is to make room for another."""
    batch.job.cancel("--signal=TERM")


def kill(batch: Batch) -> None:
    os.kill(batch.job.pid(rank=1), signal.SIGKILL)


def time_limit(batch: Batch) -> None:
    """Nothing is left to do: when its minute is nearly over Slurm sends USR1 to the batch file."""
    assert batch.job.shown()["TimeLimit"] == "00:01:00"


Disturb = Callable[[Batch], None]
DISTURBANCES: dict[Disturb, int] = {grace: 10, kill: 10, time_limit: 1}
"""With minutes until the time is up."""


@pytest.fixture(scope="module")
def batches(digits: Path, slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[Disturb, Batch]:
    """A job for each disturbance, disturbed. All at the same time, for much of it is waiting for Slurm."""
    started = {
        disturb: Batch(
            slurm,
            digits,
            tmp_path_factory.mktemp(disturb.__name__),
            f"--time={minutes}",
            hurry=disturb is not grace,
        )
        for disturb, minutes in reversed(DISTURBANCES.items())
    }
    for disturb in DISTURBANCES:
        started[disturb].under_way()
        disturb(started[disturb])
    return started


@pytest.mark.slow
def test_the_job_is_examined(slurm: Slurm, batches: object, tmp_path: Path) -> None:
    words = (*DMNIST, "doctor", "--device", "cpu", "--dataset", "generated", "--json")
    ended = slurm.call("srun", "-N2", "-n3", *words, cwd=tmp_path)
    assert ended.code == 0, ended
    told = json.loads(ended.stdout)
    assert (told["launcher"], told["world_size"]) == ("srun", 3)
    assert {one["name"]: one["verdict"] for one in told["findings"]}["collectives"] == "good"


@pytest.mark.slow
def test_a_step_is_asked_to_stop(
    slurm: Slurm, batches: object, digits: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """All its tasks get the signal and stop at one step. The run continues at another size."""
    out = tmp_path / "out"
    words = ("train", "--device", "cpu", *paced.flags(digits), "--out", out)
    variables = {"PYTHONPATH": paced.python_path(), "PACED_UNTIL": str(tmp_path / "never")}
    command = ["srun", "-N2", "-n2", "--job-name=stopped", *DMNIST, *words]
    with Program(command, cwd=tmp_path, **slurm.variables, **variables) as program:
        program.wait_for(lambda: last_step(out) >= 3, "step 3")
        number = slurm.call("squeue", "--name=stopped", "--noheader", "--format=%i").stdout.strip()
        assert slurm.call("scancel", "--signal=USR1", f"{number}.0").code == 0
        ended = program.finish()
    assert ended.code == 75, ended
    stopped = last_step(out)
    assert saved(out)[-1] == stopped
    assert f"after step {stopped} of" in ended.stderr
    resumed = train(*paced.flags(digits), "--resume", "auto", nproc=3, out=out)
    assert starts(out) == [0, stopped]
    paced.assert_same(resumed, expected, world_size=3)


def requeued(batch: Batch) -> None:
    """Check that it stopped with a checkpoint and was requeued, and that the last attempt began there."""
    step = starts(batch.out)[-1]
    assert f"after step {step} of" in batch.job.output()
    left = f"ended after runs/slurm-{batch.job.number}/checkpoints/step_{step:08d}.pt"
    assert f"code 75, {left}: requeued" in batch.job.output()


@pytest.mark.slow
def test_requeued_at_the_time_limit(batches: dict[Disturb, Batch], expected: dict[str, Any]) -> None:
    """The job restarts by itself, and no work is lost."""
    batch = batches[time_limit]
    assert batch.job.ended() == "COMPLETED", batch.job.output()
    first, *more = starts(batch.out)
    assert first == 0
    # With a minute's limit, a slow machine may be stopped more than once.
    assert int(batch.job.shown()["Restarts"]) >= len(more) >= 1
    requeued(batch)
    paced.assert_same(result(batch.out), expected, world_size=2)


@pytest.mark.slow
def test_goes_on_where_a_task_was_killed(batches: dict[Disturb, Batch], expected: dict[str, Any]) -> None:
    """The batch file starts again on the same nodes. Only the work since the last checkpoint is lost."""
    batch = batches[kill]
    assert batch.job.ended() == "COMPLETED", batch.job.output()
    assert batch.job.shown()["Restarts"] == "0"
    first, again = starts(batch.out)
    assert first == 0
    left = f"ended after runs/slurm-{batch.job.number}/checkpoints/step_{again:08d}.pt"
    assert f"code 137, {left}: starting again" in batch.job.output()
    paced.assert_same(result(batch.out), expected, world_size=2)


@pytest.mark.slow
def test_makes_room_and_is_cancelled_later(batches: dict[Disturb, Batch]) -> None:
    """It is requeued the first time. Cancelled by hand, it saves too, and stays cancelled."""
    batch = batches[grace]
    batch.under_way(attempt=2)
    requeued(batch)
    batch.job.cancel()
    assert batch.job.ended() == "CANCELLED"
    assert batch.job.shown()["Restarts"] == "1"
    assert len(starts(batch.out)) == 2
    assert f"after step {saved(batch.out)[-1]} of" in batch.job.output()
    assert batch.job.output().count("requeued") == 1


# ---- What the batch file decides, with stand-ins for Slurm's commands ------------------------------------

STAND_INS = {
    "srun": """
        echo "$*" >> sruns
        read -r code step < plan
        sed -i 1d plan
        [ -z "$step" ] || touch "runs/slurm-7/checkpoints/step_$step.pt"
        exit "$code"
    """,
    "squeue": 'echo "$STATE"',
    "scontrol": 'echo "$*" >> requeues; exit "$REFUSED"',
}


@pytest.fixture
def batch_file(tmp_path: Path) -> Callable[..., tuple[int, int, str]]:
    """`batch_file("8 00000005", "0")`: run it with sruns that end so, the first after it saved step 5.

    Returns the code, how many sruns there were, and what `scontrol` was told.
    """
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "runs" / "slurm-7" / "checkpoints").mkdir(parents=True)
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}")
        (folder / name).chmod(stat.S_IRWXU)
    path = f"{folder}:{os.environ['PATH']}"

    def run(*plan: str, **variables: str) -> tuple[int, int, str]:
        (tmp_path / "plan").write_text("".join(f"{line}\n" for line in plan))
        for name in ("sruns", "requeues"):
            (tmp_path / name).write_text("")
        told = {"STATE": "RUNNING", "REFUSED": "0", "SLURM_JOB_ID": "7", **variables}
        code = subprocess.run(
            ["bash", SBATCH, "--epochs", "3"],
            check=False,
            cwd=tmp_path,
            env=environment(PATH=path, **told),
            capture_output=True,
            timeout=PATIENCE,
        ).returncode
        calls = (tmp_path / "sruns").read_text().splitlines()
        for call in calls:
            assert call.endswith(" dmnist train --out runs/slurm-7 --resume auto --epochs 3")
        return code, len(calls), (tmp_path / "requeues").read_text().strip()

    return run


@pytest.mark.parametrize("code", [75, 138, 143])
def test_requeues_what_was_asked_to_stop(batch_file: Any, code: int) -> None:
    """With a checkpoint, or by USR1 or TERM before it could listen."""
    assert batch_file(f"{code}") == (code, 1, "requeue 7")


@pytest.mark.parametrize("code", [8, 137, 139, 253])
def test_starts_again_where_a_process_was_lost(batch_file: Any, code: int) -> None:
    """Noticed by the others, killed, crashed, out of memory: the nodes are still there."""
    assert batch_file(f"{code}", "0") == (0, 2, "")
    assert batch_file(f"{code}", "75") == (75, 2, "requeue 7")


@pytest.mark.parametrize("code", range(8))
def test_ends_where_it_is_done_or_would_fail_again(batch_file: Any, code: int) -> None:
    assert batch_file(f"{code}") == (code, 1, "")


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
@pytest.mark.parametrize("code", [75, 8])
def test_stays_cancelled(batch_file: Any, code: int, state: str) -> None:
    assert batch_file(f"{code}", STATE=state) == (code, 1, "")


def test_ends_with_the_code_where_it_may_not_requeue(batch_file: Any) -> None:
    assert batch_file("75", REFUSED="1") == (75, 1, "requeue 7")


def test_gives_up_without_progress(batch_file: Any) -> None:
    attempts = ["8", "137", "8", "8 00000005", "8", "8", "8 00000010", "137", "8", "8", "0"]
    assert batch_file(*attempts) == (8, 10, "")


def test_requeues_are_attempts_too(batch_file: Any) -> None:
    for _ in range(3):
        assert batch_file("138") == (138, 1, "requeue 7")
    assert batch_file("138") == (138, 1, "")


def test_requeues_only_its_own_task_of_an_array(batch_file: Any) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert batch_file("75", **array) == (75, 1, "requeue 5_2")
