"""The Muon optimizer: momentum that is made orthogonal, matrix by matrix, before it updates the weights.

In a gradient a few large directions dominate the rest. If all singular values are about one, every
direction gets its share of the step, and a network needs a fraction of the steps that Adam needs. Source:
Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024. As in that
source, Adam (Kingma and Ba, 2015) updates the biases and the last layer.

torch's own `torch.optim.Muon` accepts matrices only, but most weights here are convolutions.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .fused import Number
from .kernels import FUSED, Kernels
from .optimizers import Group, Optimizer
from .shared_work import MapMatrices, map_here


class Muon(Optimizer):
    """Muon for every weight except that of the last layer; Adam for that one and for all vectors.

    `lr` is Muon's learning rate: the spectral norm of a step is about `lr * sqrt(max(1, rows / columns))`.
    Adam's learning rate is `lr * adam_ratio`, so that one schedule controls both. A weight of more than two
    dimensions counts as the matrix `(first, all others)`.

    Muon's weights keep their Frobenius norm. They rotate and do not grow, so steps of one size are always
    rotations by one angle. Decoupled weight decay applies to the other parameters only.

    `map_matrices` makes the directions orthogonal; see `SharedWork`.
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
        kernels: Kernels = FUSED,
        map_matrices: MapMatrices = map_here,
    ) -> None:
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim >= 2][:-1]
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in matrix_ids]
        adam = {"lr": lr, "weight_decay": weight_decay, "adam_ratio": adam_ratio, "betas": betas}
        groups: list[Group] = [{"params": rest, "matrices": False, **adam}]
        if matrices:
            groups.append({"params": matrices, "matrices": True, "momentum": momentum, "lr": lr})
        super().__init__(groups, {}, kernels)
        self._map_matrices = map_matrices

    def numbers(self, parameters: list[Tensor], group: Group) -> list[float]:
        """Return the numbers of a group; see `Optimizer`."""
        return [group["lr"]] if group["matrices"] else self.adam_numbers(parameters, group)

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], group: Group, numbers: Sequence[Number]
    ) -> None:
        """Update the parameters of one group; see `Optimizer`."""
        if not group["matrices"]:
            self.adam_step(self.kernels.adamw_, parameters, gradients, group, numbers)
            return
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        self.kernels.muon_(
            parameters, gradients, buffers, lr=numbers[0], momentum=group["momentum"],
            map_matrices=self._map_matrices,
        )  # fmt: skip
