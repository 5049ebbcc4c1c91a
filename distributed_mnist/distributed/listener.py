"""Accept connections from the other ranks, and from nobody else.

A thread of its own does this, so a stranger who sends nothing, or garbage, delays no rank. It holds few
connections that have not proved that they belong to the job: a new one displaces the oldest. So strangers
can use up neither memory nor file descriptors.
"""

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future

from . import authentication
from .authentication import CLAIM_BYTES, NotOurs, Purpose

HANDSHAKE_SECONDS = 5.0
_MOST_UNPROVED = 64
_SPARE_DESCRIPTORS = 8  # which strangers leave to the rest of the process, if it may have few
_PAUSE_SECONDS = 0.002
"""Between two connections while there are many strangers. A flood must not take all CPU time."""
_SLOW_SECONDS = 1.0  # how long it stays slow after a stranger, once there have been many

Coordinate = Callable[[int, socket.socket, bytes], Coroutine[None, None, None]]


class Listener:
    """The port on which a rank accepts connections, from creation to `close`.

    `sock` is bound and listens. `key` is the job's (see `job_key`). `coordinate(rank, connection, session)`
    serves a connection to the coordinator, on rank 0, whose messages are signed with the key `session`.
    `report` is called once, with a message about the first stranger. Raises `OSError` if no file descriptor
    is left.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes,
        *,
        coordinate: Coordinate | None = None,
        report: Callable[[str], object],
    ) -> None:
        sock.setblocking(False)
        self.port: int = sock.getsockname()[1]
        self._socket, self._key, self._coordinate, self._report = sock, key, coordinate, report
        self._refused, self._slow_until, self._most_unproved = 0, 0.0, _MOST_UNPROVED
        self._arrived = threading.Condition()
        self._connections: dict[tuple[bytes, int], socket.socket] = {}  # by attempt and rank
        self._unproved: dict[asyncio.Task[bool], socket.socket] = {}  # oldest first
        self._serving: set[asyncio.Task[None]] = set()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="dmnist_listener", daemon=True
        )
        self._thread.start()
        started.result()

    def accept(self, attempt: bytes, rank: int) -> socket.socket:
        """Return the connection from this rank of this attempt, and wait until there is one."""
        with self._arrived:
            self._arrived.wait_for(lambda: (attempt, rank) in self._connections)
            return self._connections.pop((attempt, rank))

    def close(self) -> None:
        """Close the port and the connections that nobody has taken."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self, started: Future[None]) -> None:
        runner = asyncio.Runner()
        try:
            self._loop = runner.get_loop()
        except OSError as error:  # no file descriptor is left
            started.set_exception(error)
            return
        with runner, contextlib.suppress(asyncio.CancelledError):
            self._accepting = self._loop.create_task(self._accept_all())
            started.set_result(None)
            self._loop.run_until_complete(self._accepting)
        for connection in (self._socket, *self._connections.values()):
            connection.close()

    async def _accept_all(self) -> None:
        while True:
            await self._connection_waits()
            # Without a pause, a full backlog would leave no time for the handshakes.
            await asyncio.sleep(_PAUSE_SECONDS if self._loop.time() < self._slow_until else 0)
            while len(self._unproved) >= self._most_unproved:
                await self._displace_oldest()
            try:
                connection, address = self._socket.accept()
            except OSError as error:  # no file descriptor is left, or the connection is broken already
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._most_unproved = max(1, len(self._unproved) - _SPARE_DESCRIPTORS)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._admit(connection, address[0].removeprefix("::ffff:")))
            self._unproved[task] = connection
            task.add_done_callback(self._decided)

    def _connection_waits(self) -> asyncio.Future[None]:
        # Under Python 3.11, a cancelled `sock_accept` can lose a connection and print a traceback.
        found = self._loop.create_future()

        def tell() -> None:
            self._loop.remove_reader(self._socket)
            if not found.done():
                found.set_result(None)

        self._loop.add_reader(self._socket, tell)
        return found

    def _decided(self, task: asyncio.Task[bool]) -> None:
        connection = self._unproved.pop(task)
        if task.cancelled() or task.exception() is not None or not task.result():
            connection.close()
            self._refused += 1
            if self._refused > _MOST_UNPROVED:
                self._slow_until = self._loop.time() + _SLOW_SECONDS

    async def _displace_oldest(self) -> None:
        for task in list(self._unproved)[:1]:
            task.cancel()
        await asyncio.sleep(_PAUSE_SECONDS)

    async def _admit(self, connection: socket.socket, address: str) -> bool:
        """Hand the connection over if it comes from a rank of this job. Return whether it does."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                challenge = authentication.challenge()
                await self._loop.sock_sendall(connection, challenge)
                message = await receive_exactly(connection, CLAIM_BYTES)
                claim, reply, session = authentication.verify(message, self._key, challenge, self.port)
                await self._loop.sock_sendall(connection, reply)
        except NotOurs as error:
            self._note_stranger(address, str(error))
            return False
        except TimeoutError:
            self._note_stranger(address, f"it proved nothing within {HANDSHAKE_SECONDS:g} s")
            return False
        except OSError:  # it closed the connection, as a port scan or a health check does
            return False
        if claim.purpose is Purpose.COLLECTIVES:
            with self._arrived:
                self._connections[claim.attempt, claim.rank] = connection
                self._arrived.notify_all()
            return True
        if self._coordinate is None:  # a rank that believes that this process is rank 0
            return False
        task = self._loop.create_task(self._coordinate(claim.rank, connection, session))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        task.add_done_callback(lambda _: connection.close())
        return True

    def _note_stranger(self, address: str, why: str) -> None:
        report, self._report = self._report, lambda _: None
        with contextlib.suppress(OSError):  # standard error is gone
            report(
                f"a connection from {address} to port {self.port} was refused: {why} "
                "(docs/explanation/security.md; further ones are not reported)"
            )


async def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Receive `count` bytes. Raises `OSError` if the connection ends before."""
    loop, received = asyncio.get_running_loop(), bytearray()
    while len(received) < count:
        part = await loop.sock_recv(connection, count - len(received))
        if not part:
            raise ConnectionAbortedError("it closed the connection")
        received += part
    return bytes(received)
