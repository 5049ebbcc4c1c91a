"""Random numbers as a function of a key, never drawn from a stream.

A stream has a position, which would have to be saved, restored and kept equal on all ranks. A key needs
none of that: the same (seed, step) gives the same numbers on any rank, in any order, after any restart.

The bits come from Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
NumPy guarantees that its raw output never changes. The functions here use only arithmetic that IEEE 754
defines to the last bit.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_BITS_PER_BLOCK = 4  # Philox 4x64 returns four 64-bit numbers for each value of its counter


def key(*parts: int | str) -> int:
    """Return a 128-bit integer that depends on all parts and their order: `key("order", seed, epoch)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def torch_seed(*parts: int | str) -> int:
    """Return a seed for `torch.manual_seed`, of 63 bits so that it fits every generator of torch."""
    return key(*parts) >> 65


def random_bits(count: int, *parts: int | str, start: int = 0) -> NDArray[np.uint64]:
    """Return numbers `start` to `start + count - 1` of this key's sequence, uint64 `(count,)`.

    The cost does not depend on `start`. Raises `ValueError` if `start` is not a multiple of 4.
    """
    if start % _BITS_PER_BLOCK:
        raise ValueError(f"start must be a multiple of {_BITS_PER_BLOCK}, not {start}")
    philox = np.random.Philox(key=key(*parts))
    philox.advance(start // _BITS_PER_BLOCK)
    return philox.random_raw(count)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return uniform float64 in [0, 1), of the shape of `bits`: the upper 53 bits as a fraction."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """Return a random order of `0 .. count - 1`, int64 `(count,)`.

    It sorts random keys instead of shuffling: NumPy may change its shuffle, but a stable sort has only one
    result. Two of `count` 64-bit keys are equal with probability `count**2 / 2**65`; the stable sort then
    keeps their order.
    """
    return np.argsort(random_bits(count, *parts), kind="stable")
