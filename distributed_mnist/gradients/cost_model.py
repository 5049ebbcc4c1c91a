"""Predict what a gradient exchange costs: each message takes a fixed time plus a time per byte.

After Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", 1994, with one more
parameter: the time that a process itself spends on each message. `subtree_exchange` uses the model to
choose a method, and docs/explanation/performance.md uses it for predictions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ExchangeMethod = Literal["doubling", "halving", "slices", "ring"]
"""See `subtree_exchange`. "ring" is the usual all-reduce of large tensors, for comparison only."""


@dataclass(frozen=True)
class Link:
    """The speed of the connection between two processes."""

    latency: float
    """Seconds that two processes take to send each other a few bytes at the same time."""
    overhead: float
    """Seconds that each further message in one call adds."""
    bandwidth: float
    """Bytes per second, in each direction."""


LOOPBACK = Link(latency=60e-6, overhead=12e-6, bandwidth=3e9)
"""Between processes of one host. The latency includes the other costs of a round, see
docs/explanation/performance.md."""


def exchange_seconds(
    method: ExchangeMethod, size: int, nbytes: int, link: Link, *, roots: int = 1
) -> float:
    """Predict the seconds of one sum over `size` ranks with `nbytes` bytes each.

    With "slices", `roots` is the number of subtree roots of a rank, each of `nbytes` bytes.
    """
    if size == 1:
        return 0.0
    rounds, share = math.ceil(math.log2(size)), (size - 1) / size
    byte = 1 / link.bandwidth
    if method == "doubling":
        return rounds * (link.latency + nbytes * byte)
    if method == "halving":
        return 2 * (rounds * link.latency + share * nbytes * byte)
    if method == "ring":
        return 2 * (size - 1) * (link.latency + nbytes / size * byte)
    direct = link.latency + (size - 2) * link.overhead + roots * share * nbytes * byte
    return direct + rounds * link.latency + share * nbytes * byte


def fit_link(messages: Sequence[tuple[float, float]]) -> Link:
    """Estimate a link from the measured (bytes, seconds) of messages.

    The latency is the time of the smallest message. The bandwidth follows from the time that the largest
    message takes in addition.
    """
    (_, latency), (nbytes, seconds) = min(messages), max(messages)
    bandwidth = nbytes / max(seconds - latency, 1e-9)
    return Link(latency, LOOPBACK.overhead, bandwidth)


def prediction_table(
    link: Link, sizes: Sequence[int] = tuple(2**k for k in range(1, 11))
) -> list[dict[str, Any]]:
    """Predict the seconds of an exchange by each method, one row for each number of bytes and of ranks."""
    methods: tuple[ExchangeMethod, ...] = ("doubling", "halving", "slices", "ring")
    return [
        {
            "size": size,
            "bytes": nbytes,
            **{method: exchange_seconds(method, size, nbytes, link) for method in methods},
        }
        for nbytes in (31_400, 107_048, 860_776, 100_000_000)  # linear, cnn-small, cnn, a ResNet-50's
        for size in sizes
    ]
