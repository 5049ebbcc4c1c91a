"""Prove, over a new connection, that both ends belong to the same job.

The key never travels. Each side sends a random number (a nonce), and the other side returns an HMAC-SHA256
of both nonces (RFC 2104), as in other challenge-response protocols. The HMAC also covers what the
connection is for and the port, so an answer cannot be used in another place. Both sides derive a session
key from the handshake, which signs the coordinator's messages. Tensors are plain bytes: nothing protects
them against somebody who can change packets on the way (docs/explanation/security.md).

1. The side that accepts: `MAGIC`, nonce.
2. The side that connects: purpose, rank, attempt, nonce, HMAC.
3. The side that accepts: HMAC.
"""

import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

from .job_key import SECRET

MAGIC = b"dmnist 3"
_NONCE = _ATTEMPT = 16  # bytes
_MAC = SIGNATURE_BYTES = 32
CHALLENGE_BYTES = len(MAGIC) + _NONCE
_CLAIM = struct.Struct(f"<BI{_ATTEMPT}s{_NONCE}s")
CLAIM_BYTES = _CLAIM.size + _MAC
NO_ATTEMPT = bytes(_ATTEMPT)
REFUSAL = f"the job, the world size or the secret is not the same (set {SECRET} on all ranks)"


class Purpose(IntEnum):
    """What a connection is for."""

    COORDINATION = 1
    """Messages between a rank and the coordinator, which runs on rank 0."""
    COLLECTIVES = 2
    """Tensors between two ranks."""


class NotOurs(ConnectionError):
    """The other side does not belong to this job, or closed the connection before it proved that."""


class NoAnswer(TimeoutError):
    """The other side accepted the connection but proved nothing in time. It may be stopped."""


@dataclass(frozen=True)
class Claim:
    """What the connecting side says about itself. It is true once its HMAC has been checked."""

    purpose: Purpose
    rank: int
    attempt: bytes = NO_ATTEMPT
    """The random name of the group's current attempt (16 bytes); zeros if the rank does not know it yet."""


def new_attempt() -> bytes:
    """Return a random name for an attempt: 16 bytes."""
    return secrets.token_bytes(_ATTEMPT)


def challenge() -> bytes:
    """Return the first message of the accepting side."""
    return MAGIC + secrets.token_bytes(_NONCE)


def verify(message: bytes, key: bytes, challenge: bytes, port: int) -> tuple[Claim, bytes, bytes]:
    """Check the connecting side's message, in the accepting side.

    Returns the claim, the reply that proves that this side has the key too, and the session key. Raises
    `NotOurs`.
    """
    fields, mac = message[: _CLAIM.size], message[_CLAIM.size :]
    if not hmac.compare_digest(mac, _mac(key, b"connect", challenge, fields, port)):
        raise NotOurs(f"it belongs to another job, or has another secret: set {SECRET} on all ranks")
    purpose, rank, attempt, _ = _CLAIM.unpack(fields)
    if purpose not in list(Purpose):
        raise NotOurs("it wants something that this version does not know")
    reply, session = (_mac(key, label, challenge, fields, port) for label in (b"accept", b"session"))
    return Claim(Purpose(purpose), rank, attempt), reply, session


def connect(host: str, port: int, key: bytes, claim: Claim, seconds: float) -> tuple[socket.socket, bytes]:
    """Connect to another rank. Return a blocking socket without a timeout, and the session key.

    `seconds` is for the connection, and again for the handshake. Raises `OSError` if the rank cannot be
    reached, and the subclasses `NotOurs` if it does not belong to this job, `NoAnswer` if it is silent.
    """
    connection = socket.create_connection((host, port), seconds)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + seconds  # names can have several addresses, tried one after another
        challenge = _receive(connection, CHALLENGE_BYTES, deadline)
        if not challenge.startswith(MAGIC):
            raise NotOurs("another program answers")
        fields = _CLAIM.pack(claim.purpose, claim.rank, claim.attempt, secrets.token_bytes(_NONCE))
        connection.sendall(fields + _mac(key, b"connect", challenge, fields, port))
        try:
            reply = _receive(connection, _MAC, deadline)
        except ConnectionError:
            raise NotOurs(f"it refuses this process: {REFUSAL}") from None
        if not hmac.compare_digest(reply, _mac(key, b"accept", challenge, fields, port)):
            raise NotOurs("a process of another job answers")
        connection.settimeout(None)
    except TimeoutError:
        connection.close()
        raise NoAnswer("it does not answer") from None
    except BaseException:
        connection.close()
        raise
    return connection, _mac(key, b"session", challenge, fields, port)


def signature(session: bytes, sender: bytes, number: int, message: bytes) -> bytes:
    """Return the signature (32 bytes) of message number `number` of this side of a connection."""
    return hmac.digest(session, b" ".join((sender, str(number).encode(), message)), "sha256")


def _mac(key: bytes, side: bytes, challenge: bytes, fields: bytes, port: int) -> bytes:
    return hmac.digest(key, b" ".join((side, challenge, fields, str(port).encode())), "sha256")


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    received = b""
    while len(received) < count:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(count - len(received))
        if not part:
            raise NotOurs("it closed the connection")
        received += part
    return received
