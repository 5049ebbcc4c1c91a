"""What an exchange costs, by a small model: so long a message takes to begin, so long each byte takes.

After Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", 1994, with one more
number for what a process itself does for each message. `subtree_exchange` chooses by it, and
docs/explanation/performance.md predicts by it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

How = Literal["doubling", "halving", "slices", "ring"]
"""See `topology`; a ring is what an all-reduce of large tensors commonly is, for comparison."""


@dataclass(frozen=True)
class Link:
    """Between two processes."""

    latency: float
    """Seconds in which two processes send each other a few bytes, both at once."""
    overhead: float
    """Seconds that each further message of one call adds."""
    bandwidth: float
    """Bytes a second, each way."""


LOOPBACK = Link(latency=60e-6, overhead=12e-6, bandwidth=3e9)
"""Between processes of one host, with the cost of a round beside its message: see
docs/explanation/performance.md."""


def exchange_seconds(how: How, size: int, nbytes: int, link: Link, *, roots: int = 1) -> float:
    """For one sum over `size` ranks of `nbytes` each (`roots` of them with slices)."""
    if size == 1:
        return 0.0
    rounds, share = math.ceil(math.log2(size)), (size - 1) / size
    byte = 1 / link.bandwidth
    if how == "doubling":
        return rounds * (link.latency + nbytes * byte)
    if how == "halving":
        return 2 * (rounds * link.latency + share * nbytes * byte)
    if how == "ring":
        return 2 * (size - 1) * (link.latency + nbytes / size * byte)
    direct = link.latency + (size - 2) * link.overhead + roots * share * nbytes * byte
    return direct + rounds * link.latency + share * nbytes * byte


def exchange_bytes(how: How, size: int, nbytes: int, *, roots: int = 1) -> int:
    """What each rank sends for one sum."""
    if size == 1:
        return 0
    share = (size - 1) / size
    if how == "doubling":
        return math.ceil(math.log2(size)) * nbytes
    return round(share * nbytes * (1 + (roots if how == "slices" else 1)))


def fitted(messages: Sequence[tuple[float, float]]) -> Link:
    """The link on which messages of (bytes, seconds) took what they took.

    Latency is the smallest message's; the bandwidth is what the largest one adds to it.
    """
    (_, latency), (nbytes, seconds) = min(messages), max(messages)
    bandwidth = nbytes / max(seconds - latency, 1e-9)
    return Link(latency, LOOPBACK.overhead, bandwidth)


def table_of(link: Link, sizes: Sequence[int] = tuple(2**k for k in range(1, 11))) -> list[dict[str, Any]]:
    """Predicted seconds of an exchange over so many ranks, by way and bytes."""
    ways: tuple[How, ...] = ("doubling", "halving", "slices", "ring")
    return [
        {"size": size, "bytes": nbytes, **{how: exchange_seconds(how, size, nbytes, link) for how in ways}}
        for nbytes in (31_400, 107_048, 860_776, 100_000_000)  # linear, cnn-small, cnn, a ResNet-50's
        for size in sizes
    ]
