"""Muon: momentum whose matrices are made orthogonal before they move the weights.

A gradient's few largest directions drown the rest; with all singular values brought to about one, every
direction gets its share of the step, and a network needs a fraction of the steps that Adam needs. Source:
Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024. As there, the
biases and the last layer are left to Adam (Kingma and Ba, 2015).

torch's own `torch.optim.Muon` takes matrices only; most weights here are convolutions.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .optimizers import Optimizer, adam_step

# A quintic that brings singular values between 0 and 1 near one (source: as above, where it takes five
# rounds; the small networks here learn as well with three, see docs/explanation/performance.md).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 3


def orthogonalised(matrix: Tensor) -> Tensor:
    """float32 `(rows, columns)` with the same singular vectors and all singular values about one.

    By Newton-Schulz iteration, which needs nothing but products of matrices. A zero matrix stays zero.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


class Muon(Optimizer):
    """Muon for every weight but the last layer's, Adam for that one and for all vectors.

    `lr` is Muon's rate: the spectral norm of a step is about `lr * sqrt(max(1, rows / columns))`. Adam's
    is `lr * adam_ratio`, so that one schedule moves both. Weights of more than two dimensions count as
    `(first, all others)`.

    Muon's weights keep their Frobenius norm: they turn and do not grow, so a step of one size stays one
    angle. Weight decay, decoupled, is for the rest.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        adam_ratio: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        chosen = list(parameters)
        matrices = [p for p in chosen if p.ndim >= 2][:-1]
        hidden = {id(p) for p in matrices}
        rest = [p for p in chosen if id(p) not in hidden]
        adam = {"lr": lr, "weight_decay": weight_decay, "adam_ratio": adam_ratio, "betas": betas}
        groups: list[dict[str, Any]] = [{"params": rest, "matrices": False, **adam}]
        if matrices:
            groups.append({"params": matrices, "matrices": True, "momentum": momentum, "lr": lr})
        super().__init__(groups, {})

    def move(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """See `Optimizer`."""
        if group["matrices"]:
            self._orthogonal_step(parameters, gradients, group)
        else:
            rate = group["lr"] * group["adam_ratio"]
            adam_step(torch._fused_adamw_, self.state, parameters, gradients, lr=rate, group=group)

    def _orthogonal_step(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        means = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov's look ahead
        sizes = torch.stack(torch._foreach_norm(parameters))
        for p, direction in zip(parameters, ahead, strict=True):
            step = orthogonalised(direction.flatten(1))
            rows, columns = step.shape
            p.add_(step.reshape(p.shape), alpha=-lr * math.sqrt(max(1, rows / columns)))
        kept = sizes / torch.stack(torch._foreach_norm(parameters))
        kept = torch.where(sizes > 0, kept, 1)  # one that begins at zero may leave it
        torch._foreach_mul_(parameters, list(kept.unbind()))
