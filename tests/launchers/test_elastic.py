"""Groups that break, shrink and grow under torchrun, on one host: the weights are those without faults."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from paced import Job, assert_same
from ranks import TORCHRUN, events, free_port
from torchrun_agents import ELASTIC, WarmAgent, Whole, torchrun

pytestmark = pytest.mark.slow

KILLS = 10


@pytest.fixture
def job(digits: Path, tmp_path: Path) -> Job:
    (tmp_path / "data").symlink_to(digits)
    return Job(tmp_path)


def losses(out: Path) -> dict[int, float]:
    """Each step's loss; a step that was repeated counts as the last time."""
    return {
        event["first_step"] + i: loss
        for event in events(out)
        if event["event"] == "steps"
        for i, loss in enumerate(event["losses"])
    }


def assert_kept(job: Job, expected: dict[str, Any], *, world_size: int) -> None:
    assert_same(json.loads((job.out / "result.json").read_text()), expected, world_size=world_size)
    assert losses(job.out) == losses(Path(expected["out"]))


class Group:
    """Agents that meet at one of them and may come and go: `1:4` of them."""

    def __init__(self, job: Job) -> None:
        self._job, self._endpoint = job, f"127.0.0.1:{free_port()}"
        self.agents: list[Whole] = []

    def join(self, *, serves: bool = False) -> Whole:
        """One more."""
        agent = torchrun(self._endpoint, "1:4", "--local-addr", "127.0.0.1", serves=serves)
        command = (*agent, *self._job.words, "--out", self._job.out)
        program = WarmAgent(command, cwd=self._job.out.parent, **self._job.variables, **ELASTIC)
        self.agents.append(program)
        return program

    def of_rank(self, rank: int) -> Whole:
        """The agent whose worker has that rank now."""
        pid = self._job.pids()[rank]
        return next(agent for agent in self.agents if pid in {p.pid for p in agent.processes()})


@pytest.fixture
def group(job: Job) -> Iterator[Group]:
    group = Group(job)
    yield group
    for agent in group.agents:
        agent.__exit__()


def test_members_come_and_go(group: Group, job: Job, expected: dict[str, Any]) -> None:
    """One joins; rank 0 loses its agent; a worker is killed; an agent is asked to leave; one is left."""
    first, last = group.join(), group.join(serves=True)  # agents are ranked by pid
    job.under_way(last, size=2)

    third = group.join()
    job.under_way(last, size=3)

    assert group.of_rank(0) is first
    first.signal(signal.SIGKILL)
    first.gone()  # and its worker went by itself
    job.under_way(last, size=2)

    os.kill(job.pids()[1], signal.SIGKILL)
    job.under_way(last, size=2)

    third.signal(signal.SIGTERM)
    third.gone()
    job.under_way(last, size=1)

    job.hurry()
    ended = last.finish()
    assert ended.code == 0, ended
    assert_kept(job, expected, world_size=1)
    starts = [start["step"] for start in job.starts()]
    assert starts == sorted(starts), "nobody went on from an older checkpoint than the one before"


def test_kills_in_a_row(job: Job, expected: dict[str, Any]) -> None:
    """torchrun's own restarts, as fast as they come: in the midst of training, and again at birth."""
    agent = (*TORCHRUN, "--standalone", "--nproc-per-node", 2, "--max-restarts", KILLS)
    command = (*agent, "--monitor-interval", 0.1, "-m", "distributed_mnist", *job.words, "--out", job.out)
    with WarmAgent(command, cwd=job.out.parent, **job.variables) as program:
        for kill in range(KILLS // 2):
            job.under_way(program, size=2)
            before = children(program)
            os.kill(job.pids()[kill % 2], signal.SIGKILL)
            born = program.wait_for(lambda known=before: children(program) - known, "another attempt")
            os.kill(min(born), signal.SIGKILL)
        job.under_way(program, size=2)
        job.hurry()
        ended = program.finish()
    assert ended.code == 0, ended
    assert_kept(job, expected, world_size=2)


def children(program: Whole) -> set[int]:
    """An agent's workers, alive or just dead."""
    return {process.pid for process in psutil.Process(program.pid).children()}
