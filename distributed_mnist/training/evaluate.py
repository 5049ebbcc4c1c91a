"""Compute exact metrics: each sample counts once, at any number of processes.

The data is cut into chunks of a fixed size, and each rank takes contiguous whole chunks. The loss of a
chunk does not depend on the rank that computes it. The losses of the chunks are added in one fixed order,
so their total does not depend on the number of ranks.
"""

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Precision
from ..data.broadcast import Data
from ..data.split import Split, normalise
from ..distributed.world import World
from ..errors import UsageError
from ..models.build import forward

CHUNK = 250  # divides 10,000 into 40: fits a core's cache, and leaves each of 8 ranks 5
MAX_MISTAKES = 200
"""The maximum number of mistakes to list."""


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

    def figures(self) -> dict[str, float]:
        """Return accuracy, loss and number of images under the names that they have in every result."""
        return {"test_accuracy": self.accuracy, "test_loss": self.loss, "test_images": self.images}


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, world: World, precision: Precision) -> Evaluation:
    """Evaluate the model on the test images, which every rank holds; every rank returns the same metrics.

    The model runs in evaluation mode; afterwards its previous mode is restored. Raises `UsageError` if it
    does not return logits `(n, classes)`.
    """
    split, classes = data.test, len(data.class_names)
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
        logits = forward(model, normalise(images, data.mean, data.std), precision)
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


def mistakes(result: Evaluation, split: Split) -> list[dict[str, Any]]:
    """Return the mistakes of an evaluation of `split` as plain values, the most confident ones first.

    There are at most `MAX_MISTAKES`. Each has `index` (in the split), `label`, `predicted`, `confidence`
    (in the wrong class, 0 to 1) and `image` (28 by 28 bytes, in base64).
    """
    labels = split.labels.cpu().long()
    wrong = (result.predicted != labels).nonzero().flatten()
    order = torch.argsort(result.confidence[wrong], descending=True, stable=True)
    return [
        {
            "index": index,
            "label": int(labels[index]),
            "predicted": int(result.predicted[index]),
            "confidence": float(result.confidence[index]),
            "image": base64.b64encode(split.images[index].cpu().numpy().tobytes()).decode(),
        }
        for index in wrong[order][:MAX_MISTAKES].tolist()
    ]
