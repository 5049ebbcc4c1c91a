"""Compute exact metrics: each sample counts once, at any number of processes.

The data is cut into chunks of a fixed size, and each rank takes contiguous whole chunks: as many as others,
or fewer if it is slower and `--balance` is on. The loss of a chunk does not depend on the rank that
computes it. The losses of the chunks are added in one fixed order, so their total does not depend on the
number of ranks.
"""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.digest import digest
from ..config import Precision
from ..data.broadcast import Data
from ..data.split import Split, normalise
from ..distributed.world import World
from ..errors import UsageError
from ..exact.loss import cross_entropy
from ..exact.ordered_sums import first_largest, softmax, sum_over
from ..gradients.agreement import Results, compare
from ..gradients.exact.parts import Parts
from ..models.build import forward, same_modes

CHUNK = 250  # divides 10,000 into 40: fits a core's cache, and leaves each of 8 ranks 5
MAX_MISTAKES = 200
"""The maximum number of mistakes to list."""
_MAX_PICTURE_BYTES = 4 << 20  # of all listed mistakes, which the report contains


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

    def __repr__(self) -> str:
        return f"<Evaluation: {self.accuracy:.2%} of {self.images:,} images, loss {self.loss:.4f}>"

    @property
    def accuracy(self) -> float:
        """The fraction of images that are classified correctly."""
        return self.correct / self.images

    def figures(self, images: str = "test") -> dict[str, float]:
        """Return accuracy, loss and number of images under the names that they have in every result.

        `images` says which images they are: test or validation.
        """
        return {
            f"{images}_accuracy": self.accuracy,
            f"{images}_loss": self.loss,
            f"{images}_images": self.images,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    world: World,
    precision: Precision,
    name: str = "",
    *,
    exact: bool = True,
    split: Split | None = None,
    parts: Parts | None = None,
) -> Evaluation:
    """Evaluate the model on `split`, by default the test images, which every rank holds.

    Every rank returns the same metrics. `parts` are the ranks' parts of it, by default even ones. The model
    runs in evaluation mode; afterwards its previous mode is restored. `name` is the model's, for messages.
    Raises `UsageError` if it does not return logits `(n, classes)`. If `exact`, one chunk of each rank is
    repeated on another one: raises `UsageError` if the model's logits are not the same when it is repeated,
    and `TrainingError` if a rank computes different logits from the others.
    """
    split, classes = split or data.test, len(data.class_names)
    chunks, parts = -(-len(split) // CHUNK), parts or Parts(world.size)
    losses = torch.zeros(chunks, device=world.device)
    predicted = torch.zeros(len(split), dtype=torch.int64, device=world.device)
    confidence = torch.zeros(len(split), device=world.device)

    def logits_of(chunk: int) -> Tensor:
        images = split.images[chunk * CHUNK : (chunk + 1) * CHUNK].clone()
        logits = forward(model, normalise(images, data.mean, data.std), precision)
        if logits.shape != (len(images), classes):
            shape, expected = tuple(logits.shape), (len(images), classes)
            raise UsageError(
                f"the model returns shape {shape} for {len(images)} images; expected logits {expected}"
            )
        return logits + 0  # in exact arithmetic, the sign of a zero may differ between machines

    score = _score_exactly if precision == "exact" else _score
    checked = ""
    with same_modes(model):
        model.eval()
        for chunk in parts.of(world.rank, chunks):
            world.status.made_progress()
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            logits = logits_of(chunk)
            checked = checked or digest(logits)
            losses[chunk], confidence[rows], predicted[rows] = score(logits, split.labels[rows].long())
        if exact:
            _require_same_logits(world, parts, chunks, checked, logits_of, name)
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


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses of `n` images, and for each the highest probability and its class."""
    confidence, predicted = logits.softmax(1).max(1)
    return F.cross_entropy(logits, labels, reduction="sum"), confidence, predicted


def _score_exactly(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_score` does, with the same bits on every machine.

    Of equal logits the first is the highest; if one is not a number, the last class is predicted.
    """
    losses, _ = cross_entropy(logits, labels)
    probabilities = softmax(logits.double(), 1)
    return sum_over(losses.double(), 0), probabilities.amax(1), first_largest(logits, 1)


def _require_same_logits(
    world: World,
    parts: Parts,
    chunks: int,
    checked: str,
    logits_of: Callable[[int], Tensor],
    name: str,
) -> None:
    """Raise an error if the first chunk of a rank has other logits when it is repeated by the rank before.

    `checked` is the digest of the logits of this rank's first chunk; empty if it has none.
    """

    def again(rank: int) -> str:
        return digest(logits_of(next(iter(parts.of(rank, chunks)), 0)))

    def repeat(rank: int) -> Results:
        digests = [again(rank) for _ in range(2)]
        return Results(usual=digests[:1], alone=digests, fresh=digests[:1])

    neighbour = again((world.rank + 1) % world.size)
    found = compare(world, checked or again(world.rank), neighbour, repeat)
    if found is not None:
        raise found.error(world, name, "logits in evaluation")


def mistakes(result: Evaluation, split: Split, first: int = 0) -> list[dict[str, Any]]:
    """Return the mistakes of an evaluation of `split` as plain values, the most confident ones first.

    There are at most `MAX_MISTAKES`, or fewer if the images are large. Each has `index` (in the split,
    counted from `first`), `label`, `predicted`, `confidence` (in the wrong class, 0 to 1) and `image` (its
    bytes, in base64).
    """
    most = max(1, min(MAX_MISTAKES, _MAX_PICTURE_BYTES // math.prod(split.image_shape)))
    labels = split.labels.cpu().long()
    wrong = (result.predicted != labels).nonzero().flatten()
    order = torch.argsort(result.confidence[wrong], descending=True, stable=True)
    return [
        {
            "index": first + index,
            "label": int(labels[index]),
            "predicted": int(result.predicted[index]),
            "confidence": float(result.confidence[index]),
            "image": base64.b64encode(split.images[index].cpu().numpy().tobytes()).decode(),
        }
        for index in wrong[order][:most].tolist()
    ]
