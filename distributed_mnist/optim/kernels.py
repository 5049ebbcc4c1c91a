"""What the optimizers compute with, in two kinds: torch's fused kernels, and the same bits everywhere."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import exact_muon, fused, newton_schulz, single_operations


class Kernels(NamedTuple):
    """Functions that change lists of parameters and of their state in place.

    What changes from step to step they get as numbers, which may be tensors on the device.
    """

    adam_numbers: Callable[..., list[float]]
    """Counts a step of Adam, on the CPU, and returns its numbers, for `adam_` and `adamw_`."""
    adam_: Callable[..., None]
    adamw_: Callable[..., None]
    sgd_: Callable[..., None]
    muon_: Callable[..., None]
    """With the arguments of `newton_schulz.muon_`."""
    lerp_: Callable[..., object]
    """With those of `torch._foreach_lerp_`."""
    counts_on_cpu: bool
    """Whether Adam's number of steps is on the CPU, not where the parameters are."""
    numbers_dtype: torch.dtype
    """Of numbers in tensors: torch's fused kernels read float32 on a GPU."""


FUSED = Kernels(
    fused.adam_numbers,
    fused.adam_,
    fused.adamw_,
    fused.sgd_,
    newton_schulz.muon_,
    torch._foreach_lerp_,
    counts_on_cpu=False,
    numbers_dtype=torch.float32,
)
"""The fastest on this machine."""
EXACT = Kernels(
    single_operations.adam_numbers,
    single_operations.adam_,
    single_operations.adamw_,
    single_operations.sgd_,
    exact_muon.muon_,
    single_operations.move_,
    counts_on_cpu=True,
    numbers_dtype=torch.float64,
)
"""The same bits on every machine: for `--precision exact`."""
