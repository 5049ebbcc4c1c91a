"""Exact metrics: every sample once, for any number of processes.

The set is cut into chunks of a fixed size; ranks take contiguous runs of whole chunks. A chunk's loss is
the same number whoever computes it, and the chunks' losses are added in one order, so the total is too.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Precision
from ..data.split import Split, normalise
from ..distributed.world import World
from ..errors import UsageError

CHUNK = 250  # divides 10,000 into 40: fits a core's cache, and leaves each of 8 ranks 5


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a labelled set."""

    loss: float
    """Mean cross-entropy in nats."""
    correct: int
    images: int
    confusion: list[list[int]]
    """Row: true class; column: predicted class."""
    predicted: Tensor = field(compare=False)
    """`(n,)` int64 on the CPU: the class of the highest logit, by index of the image."""
    confidence: Tensor = field(compare=False)
    """`(n,)` float32 on the CPU: the probability that the model gives to that class."""

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose highest logit is their label's."""
        return self.correct / self.images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    world: World,
    *,
    classes: int,
    mean: float,
    std: float,
    precision: Precision,
) -> Evaluation:
    """Run the model in evaluation mode over a split that every rank holds; all get the same answer."""
    chunks = -(-len(split) // CHUNK)
    losses = torch.zeros(chunks, device=world.device)
    predicted = torch.zeros(len(split), dtype=torch.int64, device=world.device)
    confidence = torch.zeros(len(split), device=world.device)
    was_training = model.training
    model.eval()
    for chunk in range(world.rank * chunks // world.size, (world.rank + 1) * chunks // world.size):
        world.status.moved()
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        images, labels = split.images[rows].clone(), split.labels[rows].long()
        logits = forward(model, normalise(images, mean, std), precision)
        if logits.shape != (len(images), classes):
            got, wanted = tuple(logits.shape), (len(images), classes)
            raise UsageError(f"the network gives {got} for {wanted[0]} images, not logits {wanted}")
        losses[chunk] = F.cross_entropy(logits, labels, reduction="sum")
        confidence[rows], predicted[rows] = logits.softmax(1).max(1)
    model.train(was_training)
    # In each place at most one rank has something other than zero: the sums are exact.
    total = math.fsum(world.all_reduce_sum_(losses).tolist())
    predicted, confidence = world.all_reduce_sum_(predicted).cpu(), world.all_reduce_sum_(confidence).cpu()
    labels = split.labels.long().cpu()
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    return Evaluation(
        loss=total / len(split),
        correct=int(confusion.trace()),
        images=int(confusion.sum()),
        confusion=confusion.tolist(),
        predicted=predicted,
        confidence=confidence,
    )


def forward(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """float32 logits `(n, classes)` of normalised images, computed in the given precision."""
    if precision == "fp32":
        logits = model(images)
    else:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(images)
    if not isinstance(logits, Tensor):
        raise UsageError(f"the network gives a {type(logits).__name__}, not a tensor of logits")
    return logits.float()
