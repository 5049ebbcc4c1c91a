"""Combine several networks into one by averaging their probabilities."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vote(nn.Module):
    """Computes the logarithm of the mean of several models' probabilities, `(n, classes)`.

    These are logits: the highest is the ensemble's prediction, and their cross-entropy is the ensemble's
    loss. (Averaging of probabilities: Lakshminarayanan and others, "Simple and scalable predictive
    uncertainty estimation using deep ensembles", 2017.)
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        log_probabilities = [F.log_softmax(member(images).float(), dim=1) for member in self.members]
        return torch.stack(log_probabilities).logsumexp(0) - math.log(len(log_probabilities))
