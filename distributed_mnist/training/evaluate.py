"""Compute exact metrics: each sample counts once, at any number of processes.

The data is cut into chunks of a fixed size, and each rank takes contiguous whole chunks. The loss of a
chunk does not depend on the rank that computes it. The losses of the chunks are added in one fixed order,
so their total does not depend on the number of ranks.
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
from ..models.build import forward

CHUNK = 250  # divides 10,000 into 40: fits a core's cache, and leaves each of 8 ranks 5


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on labelled images."""

    loss: float
    """Mean cross-entropy in nats."""
    correct: int
    images: int
    confusion: list[list[int]]
    """Row: true class; column: predicted class."""
    predicted: Tensor = field(compare=False)
    """`(n,)` int64 on the CPU: for each image, the class with the highest logit."""
    confidence: Tensor = field(compare=False)
    """`(n,)` float32 on the CPU: the probability of that class, according to the model."""

    @property
    def accuracy(self) -> float:
        """The fraction of images that are classified correctly."""
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
    """Evaluate the model on a split that every rank holds; every rank returns the same metrics.

    `mean` and `std` normalise the images. The model runs in evaluation mode; afterwards its previous mode
    is restored. Raises `UsageError` if the model does not return logits `(n, classes)`.
    """
    chunks = -(-len(split) // CHUNK)
    losses = torch.zeros(chunks, device=world.device)
    predicted = torch.zeros(len(split), dtype=torch.int64, device=world.device)
    confidence = torch.zeros(len(split), device=world.device)
    was_training = model.training
    model.eval()
    for chunk in range(world.rank * chunks // world.size, (world.rank + 1) * chunks // world.size):
        world.status.made_progress()
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        images, labels = split.images[rows].clone(), split.labels[rows].long()
        logits = forward(model, normalise(images, mean, std), precision)
        if logits.shape != (len(images), classes):
            shape, expected = tuple(logits.shape), (len(images), classes)
            raise UsageError(
                f"the model returns shape {shape} for {len(images)} images; expected logits {expected}"
            )
        losses[chunk] = F.cross_entropy(logits, labels, reduction="sum")
        confidence[rows], predicted[rows] = logits.softmax(1).max(1)
    model.train(was_training)
    # Each position is nonzero on at most one rank, so the sums are exact.
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
