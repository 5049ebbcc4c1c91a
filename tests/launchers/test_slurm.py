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
    """A job of the batch file with one task on each node. It takes its time, until `hurry` exists."""

    def __init__(self, slurm: Slurm, digits: Path, folder: Path, minutes: int) -> None:
        words = (
            f"--time={minutes}",
            "--nodes=2",
            "--ntasks-per-node=1",
            SBATCH,
            "--device",
            "cpu",
            *paced.flags(digits),
        )
        self.hurry = folder / "hurry"
        variables = {"PACED_UNTIL": str(self.hurry), "PYTHONPATH": paced.python_path()}
        self.job: Job = slurm.submit(*words, cwd=folder, **variables)
        self.out = folder / "runs" / f"slurm-{self.job.number}"

    def under_way(self, attempt: int = 1) -> None:
        def saves() -> bool:
            begun = starts(self.out)
            return len(begun) == attempt and bool(saved(self.out)) and saved(self.out)[-1] > begun[-1]

        self.job.wait_for(saves, f"a checkpoint of attempt {attempt}")

    def left(self, attempt: int) -> str:
        """What the batch file says about what the attempt before this one left. This one began there."""
        step = starts(self.out)[attempt - 1]
        return f"ended after runs/slurm-{self.job.number}/checkpoints/step_{step:08d}.pt"


@pytest.fixture(scope="module")
def timed_out(digits: Path, slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A job with a minute. When it is nearly over Slurm sends USR1 to the batch file, that is at once."""
    batch = Batch(slurm, digits, tmp_path_factory.mktemp("timed_out"), minutes=1)
    batch.hurry.symlink_to(batch.out / "attempts")  # which the batch file writes then
    return batch


@pytest.mark.slow
def test_the_job_is_examined(slurm: Slurm, timed_out: Batch, tmp_path: Path) -> None:
    words = (*DMNIST, "doctor", "--device", "cpu", "--dataset", "generated", "--json")
    ended = slurm.call("srun", "-N2", "-n2", *words, cwd=tmp_path)
    assert ended.code == 0, ended
    told = json.loads(ended.stdout)
    assert (told["launcher"], told["world_size"]) == ("srun", 2)
    assert {one["name"]: one["verdict"] for one in told["findings"]}["collectives"] == "good"


@pytest.mark.soak
def test_a_step_is_asked_to_stop(
    slurm: Slurm, digits: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Without the batch file: all tasks get the signal and stop at one step."""
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


@pytest.mark.slow
def test_killed_then_makes_room_then_cancelled(
    slurm: Slurm, timed_out: Batch, digits: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Three attempts of one job. The run is finished by hand later, at another size."""
    batch = Batch(slurm, digits, tmp_path, minutes=10)

    # The batch file starts again on the same nodes. Only the work since the last checkpoint is lost.
    batch.under_way()
    os.kill(batch.job.pid(rank=1), signal.SIGKILL)
    batch.under_way(attempt=2)
    assert batch.job.shown()["Restarts"] == "0"
    assert f"code 137, {batch.left(2)}: starting again" in batch.job.output()

    # Slurm asks the tasks alone when the job is to make room for another. It is requeued; no work is lost.
    batch.job.cancel("--signal=TERM")
    batch.under_way(attempt=3)
    assert f"after step {starts(batch.out)[-1]} of" in batch.job.output()
    assert f"code 75, {batch.left(3)}: requeued" in batch.job.output()

    # Cancelled by hand, it saves too, and stays cancelled.
    batch.job.cancel()
    assert batch.job.ended() == "CANCELLED"
    assert batch.job.shown()["Restarts"] == "1"
    assert len(starts(batch.out)) == 3
    assert f"after step {saved(batch.out)[-1]} of" in batch.job.output()
    assert batch.job.output().count("requeued") == 1

    finished = train(*paced.flags(digits), "--resume", "auto", nproc=3, out=batch.out)
    paced.assert_same(finished, expected, world_size=3)


@pytest.mark.slow
def test_requeued_at_the_time_limit(timed_out: Batch, expected: dict[str, Any]) -> None:
    """The job restarts by itself, and no work is lost."""
    assert timed_out.job.ended() == "COMPLETED", timed_out.job.output()
    assert timed_out.job.shown()["TimeLimit"] == "00:01:00"
    first, *more = starts(timed_out.out)
    assert first == 0
    # With a minute's limit, a slow machine may be stopped more than once.
    assert int(timed_out.job.shown()["Restarts"]) >= len(more) >= 1
    assert f"after step {more[-1]} of" in timed_out.job.output()
    assert f"code 75, {timed_out.left(len(more) + 1)}: requeued" in timed_out.job.output()
    paced.assert_same(result(timed_out.out), expected, world_size=2)


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
