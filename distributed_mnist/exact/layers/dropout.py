"""Dropout with masks that depend on the sample, not on the pass in which it is."""

import math

import numpy as np
import torch
from torch import Tensor

from ...common.random_keys import random_bits
from ..passes.interface import Draw, Pass
from ..refusal import Refused


def dropout(pass_: Pass, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Set each element to zero with probability `p`, and divide the others by `1 - p`."""
    return _dropout(pass_, x, tuple(x.shape), p, training, inplace)


def feature_dropout(
    pass_: Pass, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Do the same with whole channels of `(n, channels, ...)`."""
    return _dropout(pass_, x, (*x.shape[:2], *(1,) * (x.ndim - 2)), p, training, inplace)


def _dropout(
    pass_: Pass, x: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool
) -> Tensor:
    if not training or p == 0:
        return x
    if shape[0] % pass_.samples:
        raise Refused(
            "dropout of a tensor whose first dimension is not that of the samples has no exact form"
        )
    bits = bits_by_sample(pass_.next_draw(), pass_.samples, math.prod(shape) // pass_.samples)
    kept = (bits >= round(p * 2.0**32)).view(shape).to(x.device, torch.float32)
    kept *= 1 / (1 - p) if p < 1 else 0.0
    return x.mul_(kept) if inplace else x * kept


def bits_by_sample(draw: Draw, samples: int, count: int) -> Tensor:
    """Return `count` random integers below 2**32 for each sample, int64 `(samples, count)` on the CPU.

    They depend on the key and on the sample's place in the batch.
    """
    width = -(-count // 8) * 8  # the generator makes blocks of eight
    bits = random_bits(samples * width // 2, *draw.key, start=draw.first * width // 2)
    halves = bits.astype("<u8", copy=False).view("<u4").astype(np.int64)
    return torch.from_numpy(halves.reshape(samples, width)[:, :count])
