"""What the optimizers compute with, in two kinds: torch's fused kernels, and the same bits everywhere."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import exact_muon, newton_schulz, single_operations


class Kernels(NamedTuple):
    """Functions that change lists of parameters and of their state in place."""

    adam_: Callable[..., object]
    """With the arguments of `torch._fused_adam_`."""
    adamw_: Callable[..., object]
    """With those of `torch._fused_adamw_`."""
    sgd_: Callable[..., object]
    """With those of `torch._fused_sgd_`."""
    muon_: Callable[..., object]
    """With those of `newton_schulz.muon_`."""
    lerp_: Callable[..., object]
    """With those of `torch._foreach_lerp_`."""


FUSED = Kernels(
    torch._fused_adam_, torch._fused_adamw_, torch._fused_sgd_, newton_schulz.muon_, torch._foreach_lerp_
)
"""The fastest on this machine."""
EXACT = Kernels(
    single_operations.adam_,
    single_operations.adamw_,
    single_operations.sgd_,
    exact_muon.muon_,
    single_operations.move_,
)
"""The same bits on every machine: for `--precision exact`."""
