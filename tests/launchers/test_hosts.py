"""Across hosts with separate networks: the same weights, or an error that names what is unreachable."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Network, new_port
from paced import Job, assert_same
from ranks import DMNIST, Finished, Program
from torchrun_agents import ELASTIC, WarmAgent, torchrun

from distributed_mnist.distributed import rendezvous

pytestmark = pytest.mark.slow


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def give_data(digits: Path, *hosts: Host) -> None:
    """The images lie where these hosts' programs start, and nowhere on the others."""
    for host in hosts:
        (host.folder / "data").symlink_to(digits)


def by_hand(
    hosts: Sequence[Host], each: Sequence[int], command: Sequence[object], meet: str, **variables: str
) -> list[Program]:
    """Ranks as a scheduler starts them that sets torchrun's variables: `each[i]` of them on host i."""
    port = str(new_port())
    places = [(host, local, size) for host, size in zip(hosts, each, strict=True) for local in range(size)]
    return [
        host.start(
            command,
            **variables,
            RANK=str(rank),
            WORLD_SIZE=str(len(places)),
            LOCAL_RANK=str(local),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR=meet,
            MASTER_PORT=port,
        )
        for rank, (host, local, size) in enumerate(places)
    ]


def one_each(hosts: Sequence[Host], job: Job, *more: object) -> list[Program]:
    """One rank on each host. They train slowly until they are told to hurry."""
    command = (*DMNIST, *job.words, "--out", job.out, *more)
    return by_hand(hosts, [1] * len(hosts), command, hosts[0].address, **job.variables)


def agents(hosts: Sequence[Host], nnodes: object, job: Job, *more: object, last: Host) -> list[WarmAgent]:
    """torchrun on each of the hosts; they meet at the `last` to be given up."""
    command = (*torchrun(f"{last.name}:{new_port()}", nnodes), *job.words, *more)
    return [host.start_agent(command, **job.variables, **ELASTIC) for host in hosts]


def told(ended: Finished, code: int) -> str:
    """The one line in which a rank says why it ended with this code."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.stderr, ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dmnist: ")]
    if lines and "waits for the others at" in lines[0]:  # rank 0 says so when it starts
        del lines[0]
    assert len(lines) == 1, ended
    return lines[0]


def stored(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


# ---- Nothing happens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("each", "meet"), [((1, 1), "192.168.83.1"), ((2, 1), "host1")])
def test_without_an_agent(each: tuple[int, ...], meet: str, expected: Any, digits: Path, job: Job) -> None:
    """Only the first host has the data; and its own name leads to itself, as on a fresh Debian."""
    job.hurry()
    with Network(len(each)) as hosts:
        give_data(digits, hosts[0])
        command = (*DMNIST, *job.words, "--out", "out", "--json")
        programs = by_hand(hosts, each, command, meet, **job.variables)
        first, *others = [program.finish() for program in programs]
        assert (hosts[0].folder / "out" / "result.json").exists()
    assert_same(first.json(), expected, world_size=sum(each))
    assert [(end.code, end.stdout) for end in others] == [(0, "")] * len(others)


def test_torchrun(expected: Any, digits: Path, job: Job) -> None:
    job.hurry()
    with Network(2) as hosts:
        give_data(digits, hosts[0])  # whose name is the first in order, so that rank 0 is there
        programs = agents(hosts, 2, job, "--out", "out", "--json", last=hosts[0])
        first, second = [program.finish() for program in programs]
    assert_same(first.json(), expected, world_size=2)
    assert (second.code, second.stdout) == (0, "")


@pytest.mark.parametrize(
    "discipline",
    ["netem delay 20ms 5ms loss 1% rate 16mbit", "tbf rate 16mbit burst 16kb latency 50ms"],
)
def test_a_slow_link(discipline: str, expected: Any, digits: Path, job: Job) -> None:
    """Late, lost and queued packets cost time, and nothing else."""
    job.hurry()
    with Network(2) as hosts:
        for host in hosts:
            host.slow(discipline)
        give_data(digits, hosts[0])
        first, second = [program.finish() for program in one_each(hosts, job, "--json")]
    assert_same(first.json(), expected, world_size=2)
    assert second.code == 0, second


# ---- A link fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "which"),
    [(Host.cut, 0), (Host.switch_off, 1)],
    ids=["the first's cable", "the second's card"],
)
def test_a_link_fails_for_good(how: Callable[[Host], None], which: int, digits: Path, job: Job) -> None:
    """Without an agent: each side ends by itself and names the other."""
    with Network(2) as hosts:
        give_data(digits, hosts[0])
        programs = one_each(hosts, job, "--hang-after", 3)
        job.under_way(programs[0], size=2)
        how(hosts[which])
        ends = [program.finish() for program in programs]
    for rank, end in enumerate(ends):
        line = told(end, 8)
        assert f"rank {1 - rank}" in line, line
        assert f"host{2 - rank}" in line, line


def test_a_link_comes_back(expected: Any, digits: Path, job: Job) -> None:
    """Before the others lose patience: nothing happened."""
    with Network(2) as hosts:
        give_data(digits, hosts[0])
        programs = one_each(hosts, job, "--hang-after", 50, "--json")
        job.under_way(programs[0], size=2)
        hosts[1].cut()
        job.standstill(programs[0])
        hosts[1].mend()
        job.hurry()
        first, second = [program.finish() for program in programs]
    assert_same(first.json(), expected, world_size=2)
    assert second.code == 0, second
    assert len(job.starts()) == 1


# ---- Rank 0 cannot be reached ----------------------------------------------------------------------------


def be_impatient() -> None:
    """Give the ranks less time to meet. (Hosts of a job can be minutes apart in starting.)"""
    rendezvous.RENDEZVOUS_SECONDS = 2


def alone(host: Host, job: Job, rank: int, meet: str) -> Program:
    """One rank of two, without the other; rank 0 is said to be at `meet`."""
    command = (*DMNIST, *job.words, "--out", job.out)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": meet, "MASTER_PORT": str(new_port())}
    return host.start(command, be_impatient, **job.variables, **place)


def test_who_does_not_reach_whom_is_told() -> None:
    """Then there is no group for doctor to examine. Each rank that cannot connect names the address."""
    with Network(3) as hosts:
        hosts[2].forget(hosts[1])
        command = (*DMNIST, "doctor", "--device", "cpu", "--dataset", "generated")
        line = told(by_hand(hosts, [1] * 3, command, hosts[0].address)[2].finish(), 8)
    assert re.search(
        rf"rank 2: lost rank 1 \(pid \d+ on host2\): no route to host at {hosts[1].address} port \d+", line
    )


def test_no_rank_zero(job: Job) -> None:
    """Nobody listens; no such host; no way there; the link is down; and the other way round."""
    with Network(3) as (first, second, third):
        third.cut()
        tried = {
            first.address: alone(second, job, 1, first.address),
            "192.168.83.77": alone(second, job, 1, "192.168.83.77"),
            "192.0.2.1": alone(second, job, 1, "192.0.2.1"),
            f"{second.address} ": alone(third, job, 1, second.address),
            "rank 1": alone(first, job, 0, first.address),
        }
        for name, program in tried.items():
            assert name in told(program.finish(), 5)


# ---- A host is gone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Host.die, Host.cut], ids=["dead", "cut off"])
def test_a_host_is_gone_for_good(
    how: Callable[[Host], None], expected: Any, digits: Path, job: Job
) -> None:
    """The others form a smaller group and finish; the worker that is cut off ends by itself. (Its agent
    waits for the store where agents meet, as long as torchrun likes.)"""
    with Network(3) as hosts:
        give_data(digits, *hosts[:2])
        programs = agents(hosts, "1:3", job, "--out", job.out, "--hang-after", 3, last=hosts[1])
        job.under_way(programs[0], size=3)
        worker = job.pids()[2]
        how(hosts[2])
        job.under_way(programs[0], size=2)
        programs[2].gone(worker)
        job.hurry()
        ends = [program.finish() for program in programs[:2]]
    assert [end.code for end in ends] == [0, 0], ends
    assert_same(stored(job.out), expected, world_size=2)


def test_the_host_of_rank_zero_is_gone(expected: Any, digits: Path, job: Job, tmp_path: Path) -> None:
    """Its folder, which no other host sees, is lost too. The other host continues from its own copy."""
    with Network(2) as (first, second):
        give_data(digits, first, second)
        programs = agents([first, second], "1:2", job, "--out", "out", "--hang-after", 3, last=second)
        before, after = (Job(tmp_path, host.folder / "out") for host in (first, second))
        before.under_way(programs[0], size=2)
        programs[0].wait_for(lambda: list(before.out.glob("checkpoints/step_*.pt")), "a checkpoint")
        first.die()
        after.under_way(programs[1], size=1)
        job.hurry()
        end = programs[1].finish()
        assert end.code == 0, end
        assert after.starts()[0]["step"] > 0
        assert_same(stored(after.out), expected, world_size=1)
