"""Compute the cross-entropy and its gradient from their formulas, which is faster than autograd."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe
from ..errors import UsageError
from ..exact import loss as exact_loss
from ..user_code.functions import find
from .own_loss import OwnLoss

Loss = Callable[[Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor]]
"""`loss(logits, labels, sizes)` returns what `cross_entropy` returns. `sizes` are those of the shards."""
_ROW_MULTIPLE = 64  # samples: a multiple of the vector length of any processor


def make_loss(recipe: Recipe, classes: int, device: torch.device) -> Loss:
    """Return the recipe's loss. Raises `UsageError` for a loss of the user's own that cannot be used."""
    if recipe.precision == "exact":
        if ":" in recipe.loss:
            raise UsageError(
                f"--loss {recipe.loss} does not go with --precision exact, which computes the "
                "cross-entropy only: use another precision"
            )
        return lambda logits, labels, sizes: exact_loss.cross_entropy(
            logits, labels, recipe.label_smoothing
        )
    if ":" in recipe.loss:
        own = OwnLoss(recipe.loss, find("--loss", recipe.loss))
        own.require_exact(classes, device)
        return own
    return lambda logits, labels, sizes: cross_entropy(logits, labels, recipe.label_smoothing)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return each sample's loss in nats, `(n,)`, and the loss's gradient, `(n, classes)`.

    The gradient is with respect to the logits. `logits` are float32 `(n, classes)`, `labels` int64 `(n,)`.
    With `p = softmax(logits)` and the target `q`, which is `smoothing / classes` at every class plus
    `1 - smoothing` at the label, the loss is `-sum(q * log(p))` and its gradient is `p - q` (Szegedy and
    others, "Rethinking the Inception architecture", 2016). The bits of a sample's results do not depend on
    the other samples.
    """
    count, classes = logits.shape
    # One row per class, not per sample: torch's kernel for short rows takes fifteen times as long. The rows
    # are padded, because the rest after the last whole vector is computed by different instructions, which
    # give different last bits.
    rows = logits.detach().t()
    if count % _ROW_MULTIPLE:
        rows = F.pad(rows, (0, _ROW_MULTIPLE - count % _ROW_MULTIPLE))
    log_p = rows.log_softmax(0)
    label = labels.unsqueeze(0)
    losses = log_p.gather(0, label).squeeze(0) * _as_tensor(smoothing - 1)
    if smoothing:
        losses -= _sum_in_order(log_p)[:count] * (smoothing / classes)
    p = log_p.exp_()
    p.scatter_(0, label, p.gather(0, label) - _as_tensor(1 - smoothing))
    if smoothing:
        p -= smoothing / classes
    return losses, p[:, :count].t().contiguous()


@lru_cache
def _as_tensor(value: float) -> Tensor:
    """Return a float32 scalar on the CPU: torch would convert a Python number again in each call."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _sum_in_order(rows: Tensor) -> Tensor:
    """Add the rows one after another: in torch's own sum the order depends on the rows' length."""
    total = rows[0].clone()
    for row in rows[1:].unbind():
        total += row
    return total
