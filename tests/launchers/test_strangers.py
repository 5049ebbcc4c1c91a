"""Processes that do not belong to a run connect to all of its ports: it ends with the same weights."""

import contextlib
import socket
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Network
from paced import Job, assert_same
from ranks import DMNIST, WarmProgram, free_port

from distributed_mnist.distributed import authentication, rendezvous
from distributed_mnist.distributed.authentication import CHALLENGE_BYTES, Claim, NotOurs, Purpose

pytestmark = pytest.mark.slow

REFUSED = (
    "was refused: it belongs to another job, or has another secret: set DMNIST_SECRET on all ranks "
    "(docs/explanation/security.md; further ones"
)


def ports_of(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which these processes listen."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]


def intrude(port: int, stack: contextlib.ExitStack) -> None:
    """Try to take a rank's place, say the wrong thing, and say nothing."""
    for purpose in Purpose:
        for rank in range(3):
            with pytest.raises(NotOurs):
                authentication.connect("127.0.0.1", port, b"a guess", Claim(purpose, rank), 30)
    pickled = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    for message in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), struct.pack("<I", 2**31), pickled):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.recv(CHALLENGE_BYTES)
            with contextlib.suppress(ConnectionError):
                stranger.sendall(message)
    for _ in range(100):
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))


def test_strangers_at_every_port_of_a_run(digits: Path, expected: Any, tmp_path: Path) -> None:
    """Each rank listens at one port, on loopback, and says once that somebody was refused."""
    job = Job(tmp_path)
    (tmp_path / "data").symlink_to(digits)
    command = (*DMNIST, *job.words, "--nproc", 2, "--out", job.out, "--json")
    with contextlib.ExitStack() as stack, WarmProgram(command, cwd=tmp_path, **job.variables) as program:
        job.under_way(program, size=2)
        found = ports_of(job.pids())
        assert [address for address, _ in found] == ["127.0.0.1"] * 2
        for _, port in found:
            intrude(port, stack)
        job.hurry()
        ended = program.finish()
    assert_same(ended.json(), expected, world_size=2)
    assert len(job.starts()) == 1
    assert len([line for line in ended.stderr.splitlines() if REFUSED in line]) == 2
    assert "Traceback" not in ended.stderr


def place(rank: int, port: int) -> dict[str, str]:
    """The variables of one of two ranks on this host that meet at this port."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_strangers_before_the_ranks_are_there(digits: Path, expected: Any, tmp_path: Path) -> None:
    """Rank 0 waits at MASTER_PORT for rank 1; strangers come first."""
    job = Job(tmp_path)
    job.hurry()
    (tmp_path / "data").symlink_to(digits)
    port = free_port()

    def start(rank: int) -> WarmProgram:
        command = (*DMNIST, *job.words, "--out", job.out, "--json")
        # Without a given secret the ranks share a file of their user.
        return WarmProgram(
            command, cwd=tmp_path, **{**job.variables, **place(rank, port), "DMNIST_SECRET": ""}
        )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with contextlib.ExitStack() as stack, start(0) as first:
        first.wait_for(listens, "rank 0")
        intrude(port, stack)
        with start(1) as second:
            ended = first.finish()
            assert second.finish().code == 0
    assert_same(ended.json(), expected, world_size=2)
    assert REFUSED in ended.stderr


def test_torchruns_store_names_an_impostor(digits: Path, expected: Any, tmp_path: Path) -> None:
    """The store is open to everybody. Whoever it names must prove that it is rank 0 of this job."""
    job = Job(tmp_path)
    job.hurry()
    (tmp_path / "data").symlink_to(digits)
    poison = tmp_path / "poison.py"
    poison.write_text(
        "import json, sys, time\n"
        "from datetime import timedelta\n"
        "import torch.distributed as dist\n"
        "port, impostor = map(int, sys.argv[1:])\n"
        "store = dist.TCPStore('127.0.0.1', port, is_master=True, timeout=timedelta(seconds=60))\n"
        "key = f'dmnist/r/{port}/2/rank 0'\n"
        "store.set(key, json.dumps(['127.0.0.1', impostor]))\n"
        "open('ready', 'w').close()\n"
        "time.sleep(120)\n"
    )
    port = free_port()
    common = {**job.variables, "TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = (*DMNIST, *job.words, "--out", job.out, "--json")
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        words = (poison, port, impostor.getsockname()[1])
        with WarmProgram(words, cwd=tmp_path) as store:
            store.wait_for((tmp_path / "ready").exists, "the store")
            one = {**common, **place(1, port)}
            with WarmProgram(command, cwd=tmp_path, **one) as second:
                impostor.settimeout(60)
                victim, _ = impostor.accept()  # rank 1 believes the store, and gets no proof
                with victim:
                    victim.sendall(authentication.MAGIC + bytes(16))
                    assert len(victim.recv(1000)) == authentication.CLAIM_BYTES
                    victim.sendall(bytes(32))
                zero = {**common, **place(0, port)}
                with WarmProgram(command, cwd=tmp_path, **zero) as first:
                    ended = first.finish()
                assert second.finish().code == 0
    assert_same(ended.json(), expected, world_size=2)


def test_several_hosts_without_a_secret_are_told() -> None:
    with Network(2) as hosts:
        command = (*DMNIST, "doctor", "--device", "cpu", "--dataset", "generated")
        where = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29400"}
        programs = [
            host.start(command, **where, RANK=str(rank), LOCAL_RANK="0", DMNIST_SECRET="")
            for rank, host in enumerate(hosts)
        ]
        first, second = [program.finish() for program in programs]
    note = "dmnist: DMNIST_SECRET is not set: any process that can reach this job's ports can join it"
    assert note in first.stderr
    assert "DMNIST_SECRET" not in second.stderr


def be_impatient() -> None:
    """Give the ranks less time to meet, and let them say sooner that they wait."""
    rendezvous.RENDEZVOUS_SECONDS, rendezvous._SILENT_SECONDS = 6, 1


def test_hosts_with_different_secrets() -> None:
    """Both sides say what is wrong while they wait."""
    with Network(2) as hosts:
        command = (*DMNIST, "doctor", "--device", "cpu", "--dataset", "generated")
        where = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29401"}
        programs = [
            host.start(
                command,
                be_impatient,
                **where,
                RANK=str(rank),
                LOCAL_RANK="0",
                DMNIST_SECRET=f"secret of host {rank}",
            )
            for rank, host in enumerate(hosts)
        ]
        first, second = [program.finish() for program in programs]
    place = f"at {hosts[0].address} port 29401"
    assert (first.code, second.code) == (5, 5)
    assert f"a connection from {hosts[1].address} to port 29401 {REFUSED}" in first.stderr
    assert f"dmnist: waiting {place} for rank 1; environment, 2 processes, " in first.stderr
    secret = "the job, the world size or the secret is not the same (set DMNIST_SECRET on all ranks)"
    refused = f"rank 0 (it refuses this process: {secret})"
    assert f"dmnist: rank 1: waiting {place} for {refused}; environment, " in second.stderr
    assert f"dmnist: rank 1: still missing {place} after 6 s: {refused}" in second.stderr
