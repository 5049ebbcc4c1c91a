"""Several networks as one, which says what they believe together."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vote(nn.Module):
    """The logarithm of the mean of several models' probabilities, `(n, classes)`.

    Its highest is what they vote for, and its cross-entropy the loss of that. (Means of probabilities: see
    Lakshminarayanan and others, "Simple and scalable predictive uncertainty estimation using deep
    ensembles", 2017.)
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        each = [F.log_softmax(member(images).float(), dim=1) for member in self.members]
        return torch.stack(each).logsumexp(0) - math.log(len(each))
