"""Random numbers that are looked up by a key, never drawn from a stream.

A stream has a position, and a position must be saved, restored and kept in step on every rank. A key
needs none of that: whoever knows (seed, step) gets the same numbers, on any rank, in any order, after
any restart.

The bits come from Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), whose raw output NumPy guarantees never to change; everything built on them here uses only
arithmetic that IEEE 754 defines to the last bit.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_BITS_PER_BLOCK = 4  # Philox 4x64 makes four 64-bit numbers for each value of its counter


def key(*parts: int | str) -> int:
    """A 128-bit integer that depends on every part and its place: `key("order", seed, epoch)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def torch_seed(*parts: int | str) -> int:
    """A seed for `torch.manual_seed` (63 bits, so that it fits every generator torch has)."""
    return key(*parts) >> 65


def random_bits(count: int, *parts: int | str, start: int = 0) -> NDArray[np.uint64]:
    """Numbers `start` to `start + count - 1` of the sequence under this key.

    Returns uint64 `(count,)`. The cost does not depend on `start`, which must be a multiple of 4.
    """
    if start % _BITS_PER_BLOCK:
        raise ValueError(f"start must be a multiple of {_BITS_PER_BLOCK}, not {start}")
    philox = np.random.Philox(key=key(*parts))
    philox.advance(start // _BITS_PER_BLOCK)
    return philox.random_raw(count)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform float64 in [0, 1), the same shape as `bits`: the upper 53 bits as a fraction."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """A random order of `0 .. count - 1`, int64 `(count,)`.

    Sorts by random keys instead of shuffling: NumPy may change how it shuffles, a stable sort has one
    answer. Two of `count` 64-bit keys collide with probability `count**2 / 2**65`; the stable sort then
    settles it.
    """
    return np.argsort(random_bits(count, *parts), kind="stable")
