"""Sockets between the ranks of a group on CPU, and the collectives over them.

The rank that waits reads for itself. gloo has a thread for that, and where ranks compute on every core the
kernel lets that thread wait for its turn: an exchange of 100 kB took two milliseconds, here it takes a
tenth of one (docs/explanation/performance.md). And who reads a closed socket knows whose it was.

Partners connect when they first have something to say. In a gather or a broadcast each rank speaks to
those at distances 1, 2, 4, ... only, so that a group of a thousand has ten connections a rank.
"""

import contextlib
import hashlib
import select
import socket
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import WorkerLost, reason
from .membership import Peer

_LARGE = 4096  # elements: below, the time of a message counts more than what is in it
_GREETING = 36  # bytes: the digest of the group's word, and a rank
_CONNECT_SECONDS = 30.0  # where nothing answers at all, a system waits minutes
_GREETING_SECONDS = 5.0  # whoever connects says at once who it is


def open_listener() -> socket.socket:
    """Where the others will reach this rank: a socket on a free port, open before anybody is told of it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)


class SocketCollectives:
    """The group's sockets. Collectives are called by all ranks in the same order, with tensors on the CPU.

    `word` is the group's own: who does not know it is not let in. `host` is rank 0's. All raise
    `WorkerLost`, naming the rank, when one they speak to has gone. (One that goes before it first connects
    is found by the group's `watch`.)
    """

    def __init__(self, rank: int, peers: Sequence[Peer], door: socket.socket, host: str, word: str) -> None:
        self._rank, self._size, self._peers, self._host = rank, len(peers), peers, host
        self._door = door
        self._word = hashlib.sha256(word.encode()).digest()
        self._links: dict[int, socket.socket] = {}

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors stacked by rank, `(...)` to `(size, ...)`, in log2(size) rounds.

        Bruck and others, "Efficient algorithms for all-to-all communications", 1997: in each round a rank
        passes on all it has, to the one as far back as that is much.
        """
        rows = tensor.new_empty((self._size, *tensor.shape))  # row i is of the i-th rank after this one
        rows[0] = tensor
        have = 1
        while have < self._size:
            count = min(have, self._size - have)
            after, before = (self._rank + have) % self._size, (self._rank - have) % self._size
            self.send_recv({before: rows[:count]}, {after: rows[have : have + count]})
            have += count
        return rows.roll(self._rank, 0) if self._rank else rows

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Row `j` goes to rank `j`; row `i` of the answer came from rank `i`. `(size, ...)` both ways."""
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        received[self._rank] = rows[self._rank]
        others = [rank for rank in range(self._size) if rank != self._rank]
        self.send_recv({rank: rows[rank] for rank in others}, {rank: received[rank] for rank in others})
        return received

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Rank `src`'s values in place on every rank, in log2(size) rounds: who has them passes them on.

        The tensor is contiguous.
        """
        place = (self._rank - src) % self._size
        distance = 1
        while distance < self._size and not place & distance:
            distance *= 2
        if place:  # the lowest bit of a place says how far it is from whom it hears
            self.send_recv({}, {(self._rank - distance) % self._size: tensor})
        while (distance := distance // 2) > 0:
            if place + distance < self._size:
                self.send_recv({(self._rank + distance) % self._size: tensor}, {})
        return tensor

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Added up in place, in the order of ranks. Of a large tensor each rank adds a slice for all."""
        if self._size == 2 or tensor.numel() < _LARGE:
            return tensor.copy_(_added(self.all_gather(tensor)))
        width = -(-tensor.numel() // self._size)
        rows = tensor.new_zeros((self._size, width))
        rows.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        total = self.all_gather(_added(self.all_to_all(rows)))
        return tensor.copy_(total.view(-1)[: tensor.numel()].view(tensor.shape))

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest in each place, in place."""
        return tensor.copy_(self.all_gather(tensor).amax(0))

    def close(self) -> None:
        """Hang up."""
        for link in (self._door, *self._links.values()):
            link.close()

    def send_recv(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Send to some ranks and receive from some, all at once; contiguous tensors, by rank.

        Neither waits for the other: two ranks that send each other more than sockets hold would wait for
        ever.
        """
        out = {rank: _bytes(tensor) for rank, tensor in sent.items() if tensor.numel()}
        into = {rank: _bytes(tensor) for rank, tensor in received.items() if tensor.numel()}
        links = {rank: self._link(rank) for rank in (*out, *into)}
        while out or into:
            moved = False
            for rank in list(out):
                moved |= self._step(rank, out, lambda view, link=links[rank]: link.send(view))
            for rank in list(into):
                moved |= self._step(rank, into, lambda view, link=links[rank]: link.recv_into(view))
            if not moved and (out or into):
                poll = select.poll()
                for rank, link in links.items():
                    wanted = select.POLLOUT * (rank in out) | select.POLLIN * (rank in into)
                    if wanted:
                        poll.register(link, wanted)
                poll.poll()

    def _step(self, rank: int, left: dict[int, memoryview], move: Callable[[memoryview], int]) -> bool:
        """Move what can be moved now of what is left for a rank; whether that was something."""
        try:
            count = move(left[rank])
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

    def _link(self, rank: int) -> socket.socket:
        """The connection with a rank: made by the higher of the two."""
        while rank not in self._links:
            if rank < self._rank:
                self._links[rank] = self._connect(self._peers[rank])
            else:
                self._accept()
        return self._links[rank]

    def _connect(self, peer: Peer) -> socket.socket:
        place = peer.address or self._host, peer.port
        try:
            link = socket.create_connection(place, _CONNECT_SECONDS)
            link.sendall(self._word + self._rank.to_bytes(4, "little"))
        except OSError as error:
            where = f"at {place[0]} port {place[1]}"
            raise WorkerLost(f"lost {peer}: {reason(error)} {where}") from error
        return _prepared(link)

    def _accept(self) -> None:
        """Let one in, if it is of the group."""
        link, _ = self._door.accept()
        link.settimeout(_GREETING_SECONDS)
        greeting = b""
        with contextlib.suppress(OSError):  # it said nothing, or went
            while len(greeting) < _GREETING and (more := link.recv(_GREETING - len(greeting))):
                greeting += more
        word, rank = greeting[:-4], int.from_bytes(greeting[-4:], "little")
        if len(greeting) == _GREETING and word == self._word and self._rank < rank < self._size:
            self._links[rank] = _prepared(link)
        else:
            link.close()


def _prepared(link: socket.socket) -> socket.socket:
    link.setblocking(False)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _added(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
