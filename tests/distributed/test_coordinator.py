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
from distributed_mnist.distributed.coordinator import Coordinator, CoordinatorConnection, Membership, _frame
from distributed_mnist.distributed.heartbeat import Heartbeat
from distributed_mnist.distributed.listener import Listener
from distributed_mnist.distributed.network import LOOPBACK, open_listener
from distributed_mnist.distributed.peer import Peer

KEY = b"the key of this job"
PATIENCE = 30.0


def process(rank: int, pid: int) -> Peer:
    return Peer(rank, "somewhere", pid)


def beat(number: int) -> Heartbeat:
    return Heartbeat(number, "training", 3, None, 0.5, 60.0, 'a "quoted".py:1 naïve', "12:00:00")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_ranks_join(size: int) -> None:
    coordinator = Coordinator(size)
    peers = [process(rank, 100 + rank) for rank in range(size)]
    for rank, peer in enumerate(peers[:-1]):
        membership = coordinator.join(peer)
        assert membership.missing == list(range(rank + 1, size))
        assert membership.peers == []
    last = coordinator.join(peers[-1])
    assert last.missing == []
    assert last.peers == peers
    assert len(last.attempt) == 16
    assert [coordinator.join(peer) for peer in peers] == [last] * size
    assert Coordinator(size).join(peers[0]).attempt != last.attempt


def test_a_rank_that_left_is_missing_and_another_process_takes_its_place() -> None:
    coordinator = Coordinator(3)
    coordinator.join(process(0, 100))
    coordinator.join(process(1, 101))
    coordinator.leave(process(1, 101))
    assert coordinator.join(process(2, 102)).missing == [1]
    assert coordinator.join(process(1, 201)).peers == [process(0, 100), process(1, 201), process(2, 102)]


def test_a_process_that_was_replaced_does_not_take_its_successor_with_it() -> None:
    coordinator = Coordinator(3)
    coordinator.join(process(1, 101))
    coordinator.join(process(1, 201))
    coordinator.leave(process(1, 101))
    assert coordinator.join(process(0, 100)).missing == [2]


@pytest.mark.parametrize("late", [process(1, 201), process(2, 102), process(-1, 5)])
def test_nobody_joins_a_complete_group(late: Peer) -> None:
    coordinator = Coordinator(2)
    coordinator.join(process(0, 100))
    complete = coordinator.join(process(1, 101))
    coordinator.leave(process(1, 101))
    with pytest.raises(NotOurs, match="complete without this process"):
        coordinator.join(late)
    assert coordinator.join(process(0, 100)) == complete


EVENTS = st.lists(st.tuples(st.sampled_from(["join", "join", "leave"]), st.integers(0, 3)), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), EVENTS)
def test_any_order_of_deaths_and_restarts(size: int, events: list[tuple[str, int]]) -> None:
    """Only living processes are counted, and all are told the same."""
    coordinator = Coordinator(size)
    alive: dict[int, Peer] = {}
    complete: list[Peer] | None = None
    for pid, (what, number) in enumerate(events):
        rank = number % size
        if what == "leave" and rank in alive:
            coordinator.leave(alive.pop(rank))
        elif what == "join" and complete is None:
            alive[rank] = process(rank, pid)
            membership = coordinator.join(alive[rank])
            assert membership.missing == [rank for rank in range(size) if rank not in alive]
            complete = membership.peers or None
            assert complete in (None, [alive[rank] for rank in sorted(alive)])
        elif what == "join":
            with pytest.raises(NotOurs):
                coordinator.join(process(rank, pid))


# ---- Over connections ------------------------------------------------------------------------------------


Connect = Callable[[int], CoordinatorConnection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to the coordinator of three ranks as this rank. Rank 0 is present."""
    coordinator = Coordinator(3)
    coordinator.join(process(0, 100))
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
    assert one.join(process(1, 101), seconds=PATIENCE).missing == [2]
    peers = [process(rank, 100 + rank) for rank in range(3)]
    assert two.join(process(2, 102), seconds=PATIENCE).peers == peers
    assert one.join(process(1, 101), seconds=PATIENCE).peers == peers
    assert one.exchange(beat(1)) == {1: beat(1)}
    assert two.exchange(beat(5)) == {1: beat(1), 2: beat(5)}
    assert one.exchange(beat(2)) == {1: beat(2), 2: beat(5)}


def test_a_rank_whose_connection_ends_is_missing(connect: Connect) -> None:
    one, two = connect(1), connect(2)
    one.join(process(1, 101), seconds=PATIENCE)
    one.close()
    until(lambda: two.join(process(2, 102), seconds=PATIENCE).missing == [1])
    again = connect(1)
    assert again.join(process(1, 201), seconds=PATIENCE).peers[1] == process(1, 201)


def test_a_late_process_is_turned_away(connect: Connect) -> None:
    for rank in (1, 2):
        connect(rank).join(process(rank, 100 + rank), seconds=PATIENCE)
    late = connect(1)
    with pytest.raises(NotOurs):
        late.join(process(1, 201), seconds=PATIENCE)


@pytest.mark.parametrize("fault", ["length", "signature", "junk", "type"])
def test_a_wrong_message_ends_only_its_own_connection(fault: str, connect: Connect) -> None:
    broken = connect(1)
    message = {"junk": b"junk", "type": encode(beat(1))}.get(fault, encode(process(1, 101)))
    signed = signature(
        b"not the session's" if fault == "signature" else broken._session, b"rank", 0, message
    )
    broken._socket.sendall(b"\xff\xff\xff\xff" if fault == "length" else _frame(message, signed))
    broken._socket.settimeout(PATIENCE)
    assert broken._socket.recv(1) == b""
    assert connect(1).join(process(1, 101), seconds=PATIENCE).missing == [2]


def test_a_rank_cannot_speak_for_another(connect: Connect) -> None:
    with pytest.raises(NotOurs):
        connect(1).join(process(2, 102), seconds=PATIENCE)
    assert connect(1).join(process(1, 101), seconds=PATIENCE).missing == [2]


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
                forged = encode(Membership(bytes(16), [], [Peer(0, "evil", 1, "192.0.2.1")]))
                client.sendall(struct.pack("<I", len(forged)) + forged + bytes(32))

        thread = threading.Thread(target=relay)
        thread.start()
        victim = CoordinatorConnection("127.0.0.2", int(port), KEY, 1, seconds=PATIENCE)
        with pytest.raises(NotOurs, match="wrong signature"):
            victim.join(process(1, 101), seconds=PATIENCE)
        victim.close()
        thread.join()
