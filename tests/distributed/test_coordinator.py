"""The coordinator: who is present while ranks come, die and come again; and heartbeats."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mnist.common.messages import encode
from distributed_mnist.distributed.authentication import CHALLENGE_BYTES, CLAIM_BYTES, NotOurs, signature
from distributed_mnist.distributed.coordinator import (
    Coordinator,
    CoordinatorConnection,
    JoinReply,
    JoinRequest,
    Membership,
    TurnedAway,
    _frame,
)
from distributed_mnist.distributed.heartbeat import Heartbeat
from distributed_mnist.distributed.listener import Listener
from distributed_mnist.distributed.network import LOOPBACK, open_listener
from distributed_mnist.distributed.peer import Peer

KEY = b"the key of this job"
JOB = {"command": "train", "--lr": "0.1", "--out": "/runs/a"}
PATIENCE = 30.0


def process(rank: int, pid: int) -> Peer:
    return Peer(rank, "somewhere", pid)


def ignore(text: str) -> None:
    """Take a report about a stranger."""


def beat(number: int) -> Heartbeat:
    return Heartbeat(number, "training", 3, None, 0.5, 60.0, 'a "quoted".py:1 naïve', "12:00:00")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_ranks_join(size: int) -> None:
    coordinator = Coordinator(size, JOB, ignore)
    peers = [process(rank, 100 + rank) for rank in range(size)]
    for rank, peer in enumerate(peers[:-1]):
        membership = coordinator.join(peer, JOB)
        assert membership.missing == list(range(rank + 1, size))
        assert membership.peers == []
    last = coordinator.join(peers[-1], JOB)
    assert last.missing == []
    assert last.peers == peers
    assert len(last.attempt) == 16
    assert [coordinator.join(peer, JOB) for peer in peers] == [last] * size
    assert Coordinator(size, JOB, ignore).join(peers[0], JOB).attempt != last.attempt


def test_a_rank_that_left_is_missing_and_another_process_takes_its_place() -> None:
    coordinator = Coordinator(3, JOB, ignore)
    coordinator.join(process(0, 100), JOB)
    coordinator.join(process(1, 101), JOB)
    coordinator.leave(process(1, 101))
    assert coordinator.join(process(2, 102), JOB).missing == [1]
    assert coordinator.join(process(1, 201), JOB).peers == [
        process(0, 100),
        process(1, 201),
        process(2, 102),
    ]


def test_a_process_that_was_replaced_does_not_take_its_successor_with_it() -> None:
    coordinator = Coordinator(3, JOB, ignore)
    coordinator.join(process(1, 101), JOB)
    coordinator.join(process(1, 201), JOB)
    coordinator.leave(process(1, 101))
    assert coordinator.join(process(0, 100), JOB).missing == [2]


@pytest.mark.parametrize("late", [process(1, 201), process(2, 102), process(-1, 5)])
def test_nobody_joins_a_complete_group(late: Peer) -> None:
    coordinator = Coordinator(2, JOB, ignore)
    coordinator.join(process(0, 100), JOB)
    complete = coordinator.join(process(1, 101), JOB)
    coordinator.leave(process(1, 101))
    with pytest.raises(TurnedAway, match="complete without this process"):
        coordinator.join(late, JOB)
    assert coordinator.join(process(0, 100), JOB) == complete


EVENTS = st.lists(st.tuples(st.sampled_from(["join", "join", "leave"]), st.integers(0, 3)), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), EVENTS)
def test_any_order_of_deaths_and_restarts(size: int, events: list[tuple[str, int]]) -> None:
    """Only living processes are counted, and all are told the same."""
    coordinator = Coordinator(size, JOB, ignore)
    alive: dict[int, Peer] = {}
    complete: list[Peer] | None = None
    for pid, (what, number) in enumerate(events):
        rank = number % size
        if what == "leave" and rank in alive:
            coordinator.leave(alive.pop(rank))
        elif what == "join" and complete is None:
            alive[rank] = process(rank, pid)
            membership = coordinator.join(alive[rank], JOB)
            assert membership.missing == [rank for rank in range(size) if rank not in alive]
            complete = membership.peers or None
            assert complete in (None, [alive[rank] for rank in sorted(alive)])
        elif what == "join":
            with pytest.raises(TurnedAway):
                coordinator.join(process(rank, pid), JOB)


# ---- Over connections ------------------------------------------------------------------------------------


Connect = Callable[[int], CoordinatorConnection]


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def connect(reports: list[str]) -> Iterator[Connect]:
    """Connect to the coordinator of three ranks as this rank. Rank 0 is present."""
    coordinator = Coordinator(3, JOB, reports.append)
    coordinator.join(process(0, 100), JOB)
    sock = open_listener(LOOPBACK)
    listener = Listener(sock, KEY, coordinate=coordinator.serve, report=lambda text: None)
    connections = []

    def connect(rank: int) -> CoordinatorConnection:
        connections.append(CoordinatorConnection(LOOPBACK, listener.port, KEY, rank, seconds=PATIENCE))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()
    listener.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_join_and_exchange_heartbeats(connect: Connect) -> None:
    one, two = connect(1), connect(2)
    assert one.join(process(1, 101), JOB, seconds=PATIENCE).missing == [2]
    peers = [process(rank, 100 + rank) for rank in range(3)]
    assert two.join(process(2, 102), JOB, seconds=PATIENCE).peers == peers
    assert one.join(process(1, 101), JOB, seconds=PATIENCE).peers == peers
    assert one.exchange(beat(1)) == {1: beat(1)}
    assert two.exchange(beat(5)) == {1: beat(1), 2: beat(5)}
    assert one.exchange(beat(2)) == {1: beat(2), 2: beat(5)}


def test_a_rank_whose_connection_ends_is_missing(connect: Connect) -> None:
    one, two = connect(1), connect(2)
    one.join(process(1, 101), JOB, seconds=PATIENCE)
    one.close()
    until(lambda: two.join(process(2, 102), JOB, seconds=PATIENCE).missing == [1])
    again = connect(1)
    assert again.join(process(1, 201), JOB, seconds=PATIENCE).peers[1] == process(1, 201)


def test_a_late_process_is_turned_away(connect: Connect) -> None:
    for rank in (1, 2):
        connect(rank).join(process(rank, 100 + rank), JOB, seconds=PATIENCE)
    late = connect(1)
    with pytest.raises(TurnedAway, match=r"group of rank 0 .*complete without this process") as caught:
        late.join(process(1, 201), JOB, seconds=PATIENCE)
    assert not caught.value.final  # this rank 0 may end, and that of the next attempt take its port


def test_a_process_of_another_job_is_told_the_difference(connect: Connect, reports: list[str]) -> None:
    """It waits no longer. Rank 0 names it, once, and the job's own rank joins afterwards."""
    other = {**JOB, "--lr": "0.5", "--shards": "4"}
    for pid in (666, 666, 667):
        with pytest.raises(TurnedAway) as caught:
            connect(1).join(process(1, pid), other, seconds=PATIENCE)
        assert caught.value.final
        assert str(caught.value) == (
            "rank 0 (pid 100 on somewhere) belongs to another job: "
            "--lr 0.1 there and 0.5 here, --shards unknown there and 4 here"
        )
    told = "belongs to another job and was turned away: --lr 0.5 there and 0.1 here, --shards 4 there and"
    assert [report.partition(" belongs")[0] for report in reports] == [
        "rank 1 (pid 666 on somewhere)",
        "rank 1 (pid 667 on somewhere)",
    ]
    assert all(told in report for report in reports)
    assert connect(1).join(process(1, 101), JOB, seconds=PATIENCE).missing == [2]
    for pid in range(20):
        with pytest.raises(TurnedAway):
            connect(1).join(process(1, pid), {}, seconds=PATIENCE)
    assert len(reports) == 8


def test_a_process_of_another_job_does_not_displace_a_rank() -> None:
    coordinator = Coordinator(2, JOB, ignore)
    coordinator.join(process(0, 100), JOB)
    complete = coordinator.join(process(1, 101), JOB)
    with pytest.raises(TurnedAway, match="another job"):
        coordinator.join(process(1, 666), {**JOB, "command": "evaluate"})
    coordinator.leave(process(1, 666))
    assert coordinator.join(process(1, 101), JOB) == complete


@pytest.mark.parametrize("fault", ["length", "signature", "junk", "type"])
def test_a_wrong_message_ends_only_its_own_connection(fault: str, connect: Connect) -> None:
    broken = connect(1)
    message = {"junk": b"junk", "type": encode(beat(1))}.get(
        fault, encode(JoinRequest(process(1, 101), JOB))
    )
    signed = signature(
        b"not the session's" if fault == "signature" else broken._session, b"rank", 0, message
    )
    broken._socket.sendall(b"\xff\xff\xff\xff" if fault == "length" else _frame(message, signed))
    broken._socket.settimeout(PATIENCE)
    assert broken._socket.recv(1) == b""
    assert connect(1).join(process(1, 101), JOB, seconds=PATIENCE).missing == [2]


def test_a_rank_cannot_speak_for_another(connect: Connect) -> None:
    with pytest.raises(NotOurs):
        connect(1).join(process(2, 102), JOB, seconds=PATIENCE)
    assert connect(1).join(process(1, 101), JOB, seconds=PATIENCE).missing == [2]


def test_closing_ends_a_call_that_waits_in_another_thread() -> None:
    """A coordinator that is cut off never answers; the thread with the heartbeats must still end."""
    silent = threading.Event()

    async def never_answer(rank: int, connection: socket.socket, session: bytes) -> None:
        silent.set()
        await asyncio.sleep(PATIENCE)

    listener = Listener(open_listener(LOOPBACK), KEY, coordinate=never_answer, report=lambda text: None)
    connection = CoordinatorConnection(LOOPBACK, listener.port, KEY, 1, seconds=PATIENCE)
    assert silent.wait(PATIENCE)
    ended: list[BaseException] = []

    def exchange() -> None:
        try:
            connection.exchange(beat(1))
        except (OSError, ValueError) as error:
            ended.append(error)

    thread = threading.Thread(target=exchange)
    thread.start()
    time.sleep(0.1)
    connection.close()
    thread.join(PATIENCE)
    assert len(ended) == 1
    listener.close()


def test_somebody_between_a_rank_and_the_coordinator_cannot_change_messages(connect: Connect) -> None:
    """It listens at the same port of another address, and passes the handshake on: both proofs hold."""
    port = connect(2).where.rpartition(" ")[2]
    with socket.create_server(("127.0.0.2", int(port))) as between:

        def relay() -> None:
            client, _ = between.accept()
            with client, socket.create_connection((LOOPBACK, int(port))) as real:
                client.sendall(real.recv(CHALLENGE_BYTES, socket.MSG_WAITALL))
                real.sendall(client.recv(CLAIM_BYTES, socket.MSG_WAITALL))
                client.sendall(real.recv(32, socket.MSG_WAITALL))
                client.recv(1000)
                evil = Membership(bytes(16), [], [Peer(0, "evil", 1, "192.0.2.1")])
                forged = encode(JoinReply(membership=evil))
                client.sendall(struct.pack("<I", len(forged)) + forged + bytes(32))

        thread = threading.Thread(target=relay)
        thread.start()
        victim = CoordinatorConnection("127.0.0.2", int(port), KEY, 1, seconds=PATIENCE)
        with pytest.raises(NotOurs, match="wrong signature"):
            victim.join(process(1, 101), JOB, seconds=PATIENCE)
        victim.close()
        thread.join()
