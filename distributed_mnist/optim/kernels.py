"""The arithmetic of the optimizers, in two kinds: torch's fused kernels, and the same bits everywhere."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import newton_schulz, single_operations


class Kernels(NamedTuple):
    """What optimizers compute with. All of it works in place where the name ends with `_`."""

    adam_: Callable[..., object]
    """With the arguments of `torch._fused_adam_`."""
    adamw_: Callable[..., object]
    sgd_: Callable[..., object]
    lerp: Callable[[list[Tensor], list[Tensor], float], list[Tensor] | tuple[Tensor, ...]]
    """A share of the way from one tensor to the other, for each pair."""
    lerp_: Callable[[list[Tensor], list[Tensor], float], object]
    add_scaled_: Callable[[Tensor, Tensor, float], object]
    """Add a multiple of a tensor."""
    norms: Callable[[list[Tensor]], list[Tensor] | tuple[Tensor, ...]]
    """Frobenius norms."""
    orthogonalise: Callable[[Tensor], Tensor]


def _add_scaled_(values: Tensor, change: Tensor, factor: float) -> None:
    values.add_(change, alpha=factor)


FUSED = Kernels(
    adam_=torch._fused_adam_,
    adamw_=torch._fused_adamw_,
    sgd_=torch._fused_sgd_,
    lerp=torch._foreach_lerp,
    lerp_=torch._foreach_lerp_,
    add_scaled_=_add_scaled_,
    norms=torch._foreach_norm,
    orthogonalise=newton_schulz.orthogonalise,
)
"""The fastest on this machine."""
EXACT = Kernels(
    adam_=single_operations.adam,
    adamw_=single_operations.adamw,
    sgd_=single_operations.sgd,
    lerp=single_operations.lerp,
    lerp_=single_operations.lerp_,
    add_scaled_=single_operations.add_scaled_,
    norms=newton_schulz.norms_exactly,
    orthogonalise=newton_schulz.orthogonalise_exactly,
)
"""The same bits on every machine: for `--precision exact`."""
