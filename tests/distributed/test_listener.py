"""The port of a rank: who is let in, and what strangers can do to it."""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ranks import PATIENCE, server

from distributed_mnist.distributed import authentication, listener
from distributed_mnist.distributed.authentication import (
    CHALLENGE_BYTES,
    CLAIM_BYTES,
    MAGIC,
    Claim,
    NotOurs,
    Purpose,
)
from distributed_mnist.distributed.listener import Listener
from distributed_mnist.distributed.network import LOOPBACK, open_listener

KEY, ATTEMPT = b"the key of this job", b"this attempt    "
MINE = Claim(Purpose.COLLECTIVES, 1, ATTEMPT)


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def port(reports: list[str]) -> Iterator[Listener]:
    opened = Listener(open_listener(LOOPBACK), KEY, report=reports.append)
    yield opened
    opened.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For strangers that wait; a rank may need longer on a busy machine."""
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.5)


def connect(port: int, key: bytes = KEY, claim: Claim = MINE) -> socket.socket:
    return authentication.connect(LOOPBACK, port, key, claim, PATIENCE)[0]


def read(connection: socket.socket, count: int) -> bytes:
    with connection.makefile("rb") as stream:
        return stream.read(count)


def closes(stranger: socket.socket) -> bool:
    """Whether the other side closes the connection in time."""
    stranger.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionResetError):  # it sent more than was read
        while stranger.recv(1000):
            pass
    return True


def test_a_rank_with_the_key_is_let_in(port: Listener, reports: list[str]) -> None:
    with connect(port.port) as theirs, port.accept(ATTEMPT, 1) as ours:
        theirs.sendall(b"first bytes")
        assert read(ours, 11) == b"first bytes"
        ours.sendall(b"an answer")
        assert read(theirs, 9) == b"an answer"
    assert reports == []


def test_connections_are_told_apart_by_attempt_and_rank(port: Listener) -> None:
    claims = [
        Claim(Purpose.COLLECTIVES, rank, name) for rank in (1, 2) for name in (ATTEMPT, b"an older one    ")
    ]
    with contextlib.ExitStack() as stack:
        for i, claim in enumerate(claims):
            stack.enter_context(connect(port.port, claim=claim)).sendall(bytes([i]))
        for i, claim in reversed(list(enumerate(claims))):
            assert read(stack.enter_context(port.accept(claim.attempt, claim.rank)), 1) == bytes([i])


def test_strangers_are_reported_once(port: Listener, reports: list[str]) -> None:
    for _ in range(3):
        with pytest.raises(NotOurs, match="it refuses this process"):
            connect(port.port, key=b"another key")
    assert len(reports) == 1
    assert reports[0].startswith(f"a connection from 127.0.0.1 to port {port.port} was refused: it belongs")
    assert "DMNIST_SECRET" in reports[0]


def test_closing_while_somebody_connects_prints_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The loop finds both at once: a connection, and that it is to end."""
    busy, go_on = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        busy.set()
        assert go_on.wait(PATIENCE)

    opened = Listener(open_listener(LOOPBACK), KEY, report=hold)
    with socket.create_connection((LOOPBACK, opened.port)) as stranger:
        stranger.sendall(bytes(CLAIM_BYTES))
        assert busy.wait(PATIENCE)
        with socket.create_connection((LOOPBACK, opened.port)) as late:
            closing = threading.Thread(target=opened.close)
            closing.start()
            time.sleep(0.1)  # it has asked the loop to end, and waits
            go_on.set()
            closing.join(PATIENCE)
            assert not closing.is_alive()
            assert closes(late)
    assert caplog.records == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("message", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(CLAIM_BYTES), bytes(2**22)])
def test_whoever_proves_nothing_is_dropped(message: bytes, port: Listener) -> None:
    with socket.create_connection((LOOPBACK, port.port)) as stranger:
        with contextlib.suppress(ConnectionError):  # it is closed while this is sent
            stranger.sendall(message)
        assert closes(stranger)


@pytest.mark.usefixtures("impatient")
def test_a_byte_now_and_then_does_not_buy_time(port: Listener) -> None:
    with socket.create_connection((LOOPBACK, port.port)) as stranger:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + PATIENCE:
                stranger.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() < began + CLAIM_BYTES * 0.1


def test_a_recorded_proof_is_worth_nothing(port: Listener) -> None:
    """Another challenge asks for another answer."""
    with open_listener(LOOPBACK) as between:
        sent: list[bytes] = []

        def record() -> None:
            client, _ = between.accept()
            with client:
                client.sendall(MAGIC + bytes(CHALLENGE_BYTES - len(MAGIC)))
                sent.append(read(client, CLAIM_BYTES))

        thread = threading.Thread(target=record)
        thread.start()
        with pytest.raises(NotOurs):
            connect(between.getsockname()[1])
        thread.join()
    with socket.create_connection((LOOPBACK, port.port)) as stranger:
        stranger.sendall(sent[0])
        assert closes(stranger)


def relay(between: socket.socket, port: int) -> None:
    """Pass a handshake on, in both directions."""
    client, _ = between.accept()
    with client, socket.create_connection((LOOPBACK, port)) as real:
        client.sendall(read(real, CHALLENGE_BYTES))
        real.sendall(read(client, CLAIM_BYTES))
        with contextlib.suppress(ConnectionError):
            client.sendall(real.recv(1000))


def reflect(between: socket.socket, port: int) -> None:
    """Send a rank's own proof back to it."""
    client, _ = between.accept()
    with client:
        client.sendall(MAGIC + bytes(CHALLENGE_BYTES - len(MAGIC)))
        client.sendall(read(client, CLAIM_BYTES)[-32:])


def pretend(between: socket.socket, port: int) -> None:
    """Send anything in the place of a proof."""
    client, _ = between.accept()
    with client:
        client.sendall(MAGIC + bytes(CHALLENGE_BYTES - len(MAGIC)) + bytes(32))
        read(client, CLAIM_BYTES)


@pytest.mark.parametrize("impostor", [relay, reflect, pretend])
def test_an_impostor_in_the_place_of_a_rank(
    impostor: Callable[[socket.socket, int], None], port: Listener
) -> None:
    """It listens where the rank is expected, on another port than the rank does."""
    with open_listener(LOOPBACK) as between:
        thread = threading.Thread(target=impostor, args=(between, port.port))
        thread.start()
        with pytest.raises(NotOurs):
            connect(between.getsockname()[1])
        thread.join()


def test_another_program_answers() -> None:
    with open_listener(LOOPBACK) as other:

        def answer() -> None:
            client, _ = other.accept()
            with client:
                client.sendall(b"220 mail.example.org ESMTP ready, how can I help you?\r\n")
                closes(client)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(NotOurs, match="another program answers"):
            connect(other.getsockname()[1])
        thread.join()


def listen_with_few_descriptors(pipe: Connection) -> None:
    """Listen with room for 40 descriptors; then say how many are open, and whether a file can be."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    opened = Listener(open_listener(LOOPBACK), KEY, report=lambda text: None)
    pipe.send(opened.port)
    with opened.accept(ATTEMPT, 1) as connection:
        connection.sendall(b"welcome")
        pipe.send(len(list(Path("/proc/self/fd").iterdir())))
    opened.close()
    pipe.send(Path("/proc/self/stat").read_text() != "")


def test_silent_strangers_do_not_use_up_the_descriptors() -> None:
    """A thousand connections that send nothing; a rank is let in all the same, soon."""
    context = server()
    pipe, theirs = context.Pipe()
    process = context.Process(target=listen_with_few_descriptors, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    port = pipe.recv()
    with contextlib.ExitStack() as stack:
        for _ in range(1_000):
            stack.enter_context(socket.create_connection((LOOPBACK, port)))
        deadline = time.monotonic() + PATIENCE
        while True:  # as a rank does: a flood may displace it
            try:
                connection = connect(port)
                break
            except (NotOurs, ConnectionResetError):
                assert time.monotonic() < deadline
        assert read(stack.enter_context(connection), 7) == b"welcome"
        assert pipe.recv() <= 40
        assert pipe.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_few_strangers_are_held_at_a_time(port: Listener) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection((LOOPBACK, port.port)))
        time.sleep(0.2)
        assert len(port._unproved) <= listener._MOST_UNPROVED
        with connect(port.port), port.accept(ATTEMPT, 1):
            pass
