"""What a rank says while it waits for the others, and when it gives up at once."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from ranks import SECRET, free_port

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import rendezvous
from distributed_mnist.distributed.coordinator import Coordinator, TurnedAway
from distributed_mnist.distributed.network import LOOPBACK, is_here
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.distributed.rendezvous import Rendezvous
from distributed_mnist.errors import LaunchError, UsageError

NOWHERE = "nowhere.invalid"
JOB = {"command": "train", "--lr": "0.1"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 0.8)
    monkeypatch.setattr(rendezvous, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 0.3)
    look_up = socket.getaddrinfo

    def without_network(host: str, *arguments: Any, **more: Any) -> Any:
        if host == NOWHERE:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", without_network)


def placement(rank: int, port: int, host: str = LOOPBACK, size: int = 2) -> Placement:
    return Placement(
        rank=rank,
        size=size,
        host=host,
        ports=(port,),
        job=f"test/{port}",
        launcher="environment",
        secret=SECRET.encode(),
    )


@pytest.fixture
def busy() -> Iterator[socket.socket]:
    """Another program listens at a port."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server


def given_up(placement: Placement, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """Why a rank gives up, and the lines that it has printed before."""
    with pytest.raises(LaunchError) as caught:
        Rendezvous(placement, None, 60.0, JOB)
    return str(caught.value), capsys.readouterr().err.splitlines()


def test_the_port_of_another_program(busy: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    port = busy.getsockname()[1]
    why, _ = given_up(placement(0, port), capsys)
    why, _, advice = why.partition(": another ")
    assert why == f"cannot listen on port {port} of this host: address already in use"
    assert advice == "job or program listens there; choose another MASTER_PORT"
    why, lines = given_up(placement(1, port), capsys)  # which accepts the connection, and is silent
    assert why.startswith(f"still missing at {LOOPBACK} port {port} after ")
    assert why.endswith(": rank 0 (it does not answer)")
    place = f"dmnist: rank 1: waiting at {LOOPBACK} port {port} for rank 0"
    assert all(line.startswith(place) for line in lines)
    assert " (it does not answer); environment, 2 processes, " in lines[0]


def test_another_program_that_answers(busy: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> None:
        for _ in range(1000):
            try:
                connection, _ = busy.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    why, lines = given_up(placement(1, busy.getsockname()[1]), capsys)
    busy.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert why.endswith("rank 0 (another program answers)")
    assert 2 <= len(lines) <= 4


@pytest.mark.parametrize(
    ("host", "problem"),
    [(NOWHERE, "this host does not know the name: "), (LOOPBACK, "connection refused")],
)
def test_nobody_is_there(host: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name may become known later: in Kubernetes, when rank 0's pod has started."""
    port = free_port()
    why, lines = given_up(placement(1, port, host), capsys)
    assert f"rank 0 ({problem}" in why
    assert all(f" for rank 0 ({problem}" in line for line in lines)


def test_rank_zero_says_whom_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    why, lines = given_up(placement(0, 0, size=30), capsys)
    missing = "rank 1, 2, 3, 4, 5, 6, 7, 8 and 21 more"
    assert why.endswith(missing)
    assert 2 <= len(lines) <= 4
    assert f" for {missing}; environment, 30 processes, 0 s so far" in lines[0]


def test_rank_zero_of_several_hosts_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = given_up(placement(0, 0, NOWHERE), capsys)
    who = f"dmnist: environment: rank 0 of 2 (pid {os.getpid()} on {socket.gethostname()})"
    assert lines[0].startswith(f"{who} waits for the others at {NOWHERE} port ")
    assert lines[0].endswith(", which is no address of this host")


def test_addresses_of_this_host() -> None:
    assert is_here(LOOPBACK)
    assert is_here("localhost")
    assert not is_here("192.0.2.1")
    assert not is_here(NOWHERE)


def in_background(make: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call `make` in a thread; its result, or its error, is then in the list."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(make())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, results


def test_a_rank_of_another_job_gives_up_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 60.0)
    monkeypatch.setattr(rendezvous, "_SILENT_SECONDS", 60.0)
    port = free_port()
    thread, results = in_background(lambda: Rendezvous(placement(0, port), None, 60.0, JOB))
    with pytest.raises(
        UsageError, match=r"rank 0 \(pid .* another job: --lr 0.1 there and 2 here"
    ) as caught:
        Rendezvous(placement(1, port), None, 60.0, {**JOB, "--lr": "2"})
    assert caught.value.on_one_rank
    assert caught.value.exit_code == 2
    second = Rendezvous(placement(1, port), None, 60.0, JOB)
    thread.join(60)
    (first,) = results
    assert [peer.rank for peer in first.peers] == [peer.rank for peer in second.peers] == [0, 1]
    first.close()
    second.close()
    (line,) = capsys.readouterr().err.splitlines()
    who = f"rank 1 (pid {os.getpid()} on {socket.gethostname()})"
    assert line == f"dmnist: {who} belongs to another job and was turned away: --lr 2 there and 0.1 here"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_take_part_ends_the_others(
    failing: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within moments, and with the same error. Before, they waited for five minutes."""
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 60.0)
    port = free_port()
    began = time.monotonic()
    others = [
        in_background(partial(Rendezvous, placement(rank, port, size=3), None, 60.0, JOB))
        for rank in range(3)
        if rank != failing
    ]
    rendezvous.tell_failure(placement(failing, port, size=3), UsageError("--epochs must be at least 1"))
    who = rf"rank {failing} \(pid \d+ on .*\) cannot take part: --epochs must be at least 1"
    for thread, results in others:
        thread.join(60)
        assert isinstance(results[0], UsageError)
        assert re.fullmatch(who, str(results[0]))
        assert not results[0].on_one_rank  # rank 0 prints it
    assert time.monotonic() - began < 15
    assert "belongs to another job" not in capsys.readouterr().err


def test_a_failing_rank_of_another_job_ends_nobody() -> None:
    """Its rank is taken here, so this group does not wait for it."""
    group = Coordinator(3, JOB, print)
    ranks = [Peer(rank, "host", 100 + rank) for rank in range(3)]
    for peer in ranks[:2]:
        group.join(peer, JOB)
    with pytest.raises(TurnedAway, match=r"rank 1 \(pid 101 on host\) takes part in its place") as refused:
        group.fail(Peer(1, "host", 200), ("UsageError", "--epochs must be at least 1"))
    assert refused.value.final
    assert refused.value.failure is None
    assert not group.join(ranks[2], JOB).missing


def test_ranks_of_one_launcher_with_other_flags_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 60.0)
    port = free_port()
    first, second = (replace(placement(rank, port), launcher_id="slurm 1.0") for rank in range(2))
    thread, results = in_background(partial(Rendezvous, first, None, 60.0, JOB))
    with pytest.raises(UsageError, match=r"rank 1 .*: it has other flags: --lr 0.1 there and 2 here"):
        Rendezvous(second, None, 60.0, {**JOB, "--lr": "2"})
    thread.join(60)
    assert "cannot take part: it has other flags" in str(results[0])


def test_nobody_is_told_where_the_launcher_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "Rendezvous", None)  # would fail
    one_host = replace(placement(1, 1), local_size=2)
    for alone in (replace(one_host, size=1), replace(one_host, launcher="spawned")):
        rendezvous.tell_failure(alone, UsageError("no"))
    rendezvous.tell_failure(replace(one_host, parent=os.getpid()), UsageError("no"))
