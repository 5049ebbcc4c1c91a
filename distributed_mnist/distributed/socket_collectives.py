"""Collectives over TCP sockets between the ranks, on the CPU, or through it for other devices.

The main thread of a waiting rank reads the sockets itself. gloo uses a separate thread. When ranks compute
on every core, that thread must wait to be scheduled. An all-to-all of 100 kB takes two milliseconds with
gloo and a tenth of a millisecond here (docs/explanation/performance.md). A closed socket also shows which
rank is gone.

Two ranks connect when they first communicate. In an all-gather or a broadcast each rank communicates only
with the ranks at distances 1, 2, 4, ..., so in a group of a thousand each rank has ten connections.
"""

import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import WorkerLost, reason
from . import authentication
from .authentication import Claim, NoAnswer, NotOurs, Purpose
from .peer import Peer
from .rendezvous import Rendezvous

_LARGE = 4096  # elements; for smaller messages latency matters more than bandwidth
_CONNECT_SECONDS = 30.0  # without this, the operating system waits minutes for a host that never answers


class Collectives(Protocol):
    """The interface of the classes below and of `TorchProcessGroup`. `World` documents the methods."""

    def all_gather(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def all_to_all(self, rows: Tensor) -> Tensor: ...  # noqa: D102
    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None: ...  # noqa: D102
    def broadcast_(self, tensor: Tensor, src: int) -> Tensor: ...  # noqa: D102
    def all_reduce_sum_(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def all_reduce_max_(self, tensor: Tensor) -> Tensor: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class SocketCollectives:
    """The collectives of a group whose tensors are on the CPU. All ranks call them in the same order.

    Every collective raises `WorkerLost`, naming the rank, if a rank that it communicates with is gone. (The
    watchdog finds a rank that disappears before it first connects.)
    """

    def __init__(self, rank: int, rendezvous: Rendezvous) -> None:
        self._rank, self._peers, self._rendezvous = rank, rendezvous.peers, rendezvous
        self._size = len(self._peers)
        self._connections: dict[int, socket.socket] = {}

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack all ranks' tensors by rank, `(...)` to `(size, ...)`, in log2(size) rounds.

        The algorithm is from Bruck and others, "Efficient algorithms for all-to-all communications", 1997.
        In each round a rank that has `n` rows sends them all to the rank `n` places before it.
        """
        rows = tensor.new_empty((self._size, *tensor.shape))  # row i is from the i-th rank after this one
        rows[0] = tensor
        present = 1
        while present < self._size:
            count = min(present, self._size - present)
            after, before = (self._rank + present) % self._size, (self._rank - present) % self._size
            self.send_recv({before: rows[:count]}, {after: rows[present : present + count]})
            present += count
        return rows.roll(self._rank, 0) if self._rank else rows

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Send row `j` to rank `j`; row `i` of the result is from rank `i`. Both are `(size, ...)`."""
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        received[self._rank] = rows[self._rank]
        others = [rank for rank in range(self._size) if rank != self._rank]
        self.send_recv({rank: rows[rank] for rank in others}, {rank: received[rank] for rank in others})
        return received

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Copy rank `src`'s values into every rank's tensor, in log2(size) rounds. `tensor` is contiguous.

        In each round every rank that has the values sends them to one more rank.
        """
        place = (self._rank - src) % self._size
        distance = 1
        while distance < self._size and not place & distance:
            distance *= 2
        if place:  # the lowest bit of a place is the distance to the rank that sends to it
            self.send_recv({}, {(self._rank - distance) % self._size: tensor})
        while (distance := distance // 2) > 0:
            if place + distance < self._size:
                self.send_recv({(self._rank + distance) % self._size: tensor}, {})
        return tensor

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum in place, in the order of ranks.

        For a large tensor, each rank sums one slice and sends it to the others.
        """
        if self._size == 2 or tensor.numel() < _LARGE:
            return tensor.copy_(_sum_in_order(self.all_gather(tensor)))
        width = -(-tensor.numel() // self._size)
        rows = tensor.new_zeros((self._size, width))
        rows.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        total = self.all_gather(_sum_in_order(self.all_to_all(rows)))
        return tensor.copy_(total.view(-1)[: tensor.numel()].view(tensor.shape))

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum of each element, in place."""
        return tensor.copy_(self.all_gather(tensor).amax(0))

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections.values():
            connection.close()

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Send to some ranks and receive from some at the same time. Maps ranks to contiguous tensors.

        Neither direction waits for the other. Otherwise two ranks that send each other more than the socket
        buffers can hold would wait forever.
        """
        to_send = {rank: _bytes(tensor) for rank, tensor in sent.items() if tensor.numel()}
        to_receive = {rank: _bytes(tensor) for rank, tensor in received.items() if tensor.numel()}
        connections = {rank: self._connection(rank) for rank in (*to_send, *to_receive)}
        while to_send or to_receive:
            moved = False
            for rank in list(to_send):
                moved |= self._transfer(rank, to_send, connections[rank].send)
            for rank in list(to_receive):
                moved |= self._transfer(rank, to_receive, connections[rank].recv_into)
            if not moved and (to_send or to_receive):
                poll = select.poll()
                for rank, connection in connections.items():
                    wanted = select.POLLOUT * (rank in to_send) | select.POLLIN * (rank in to_receive)
                    if wanted:
                        poll.register(connection, wanted)
                poll.poll()

    def _transfer(
        self, rank: int, left: dict[int, memoryview], transfer: Callable[[memoryview], int]
    ) -> bool:
        """Transfer what a rank's socket accepts now of the bytes left. Return whether any byte moved."""
        try:
            count = transfer(left[rank])
        except BlockingIOError:
            return False
        except OSError as error:
            raise WorkerLost(f"lost {self._peers[rank]}: {reason(error)}") from error
        if count == 0:
            raise WorkerLost(f"lost {self._peers[rank]}: it closed the connection")
        if count == len(left[rank]):
            del left[rank]
        else:
            left[rank] = left[rank][count:]
        return True

    def _connection(self, rank: int) -> socket.socket:
        """Return the connection to a rank. The higher rank of the two opens it."""
        if rank not in self._connections:
            if rank < self._rank:
                connection = self._connect(self._peers[rank])
            else:
                connection = self._rendezvous.accept(rank)
            connection.setblocking(False)
            self._connections[rank] = connection
        return self._connections[rank]

    def _connect(self, peer: Peer) -> socket.socket:
        host, key = peer.address or self._rendezvous.host, self._rendezvous.key
        claim = Claim(Purpose.COLLECTIVES, self._rank, self._rendezvous.attempt)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                return authentication.connect(host, peer.port, key, claim, _CONNECT_SECONDS)[0]
            except NoAnswer:
                continue  # a rank that is stopped is named by the watchdog
            except OSError as error:
                # A listener that is flooded by strangers may close a connection before the handshake ends.
                if isinstance(error, NotOurs | ConnectionResetError) and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                raise WorkerLost(f"lost {peer}: {reason(error)} at {host} port {peer.port}") from error


class StagedCollectives:
    """The collectives of a rank whose tensors are on another device: copied to the CPU, and back.

    `on_cpu` are those of its group, in which other ranks may be on the CPU or on a third kind of device.
    Copies wait for the device, so no collective returns before it is finished.
    """

    def __init__(self, on_cpu: Collectives) -> None:
        self._on_cpu = on_cpu

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See `SocketCollectives`, as for all methods."""
        return self._on_cpu.all_gather(tensor.cpu()).to(tensor.device)

    def all_to_all(self, rows: Tensor) -> Tensor:  # noqa: D102
        return self._on_cpu.all_to_all(rows.cpu()).to(rows.device)

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:  # noqa: D102
        arriving = {rank: torch.empty_like(tensor, device="cpu") for rank, tensor in received.items()}
        self._on_cpu.send_recv({rank: tensor.cpu() for rank, tensor in sent.items()}, arriving)
        for rank, tensor in received.items():
            tensor.copy_(arriving[rank])

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:  # noqa: D102
        return tensor.copy_(self._on_cpu.broadcast_(tensor.cpu(), src))

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor.copy_(self._on_cpu.all_reduce_sum_(tensor.cpu()))

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor.copy_(self._on_cpu.all_reduce_max_(tensor.cpu()))

    def close(self) -> None:  # noqa: D102
        self._on_cpu.close()


def _sum_in_order(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
