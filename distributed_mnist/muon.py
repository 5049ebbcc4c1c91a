"""Muon: momentum whose matrices are made orthogonal before they move the weights.

A gradient's few largest directions drown the rest; with all singular values brought to about one, every
direction gets its share of the step, and a network needs a fraction of the steps that Adam needs. Source:
Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024. As there, the
biases and the last layer are left to Adam (Kingma and Ba, 2015).

torch's own `torch.optim.Muon` takes matrices only; most weights here are convolutions.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# A quintic that brings singular values of 0 to 1 near one in five rounds (source: as above).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5


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


class Muon(torch.optim.Optimizer):
    """Muon for every weight but the last layer's, Adam for that one and for all vectors.

    `lr` is Muon's rate: the spectral norm of a step is about `lr * sqrt(max(1, rows / columns))`. Adam's
    is `lr * adam_ratio`, so that one schedule moves both. Weights of more than two dimensions count as
    `(first, all others)`. Weight decay is decoupled.
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
        shared = {"lr": lr, "weight_decay": weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": rest, "matrices": False, "adam_ratio": adam_ratio, "betas": betas, **shared}
        ]
        if matrices:
            groups.append({"params": matrices, "matrices": True, "momentum": momentum, **shared})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along every parameter's `grad`; `closure` is not used."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                self._orthogonal_step(parameters, group)
            elif parameters:
                self._adam_step(parameters, group)

    def _orthogonal_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in parameters:
            state, gradient = self.state[p], p.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            step = orthogonalised(gradient.lerp(mean, momentum).flatten(1))  # Nesterov's look ahead
            rows, columns = step.shape
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(step.reshape(p.shape), alpha=-lr * math.sqrt(max(1, rows / columns)))

    def _adam_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"] * group["adam_ratio"], group["betas"]
        for p in parameters:
            if not self.state[p]:
                zeros = (torch.zeros_like(p) for _ in range(2))
                self.state[p].update(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
                self.state[p]["step"] = torch.zeros(())
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        done = float(states[0]["step"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2**done))
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, roots, -lr / (1 - beta1**done))
