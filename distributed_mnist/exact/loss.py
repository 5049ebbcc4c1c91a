"""The cross-entropy and its gradient, with the same bits on every machine."""

import torch
from torch import Tensor

from .elementary import exp, log
from .ordered_sums import sum_over


@torch.no_grad()
def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return each sample's loss in nats, `(n,)`, and the loss's gradient, `(n, classes)`, both float32.

    `logits` are float32 `(n, classes)`, `labels` int64 `(n,)`. Formulas and arguments are those of
    `gradients.loss.cross_entropy`. All is computed in float64 and rounded once at the end, and a sample's
    results do not depend on the other samples.
    """
    classes = logits.shape[1]
    # One row for each class: operations on short rows take longer.
    shifted = logits.t().to(torch.float64, memory_format=torch.contiguous_format)
    shifted -= shifted.amax(0)
    p = exp(shifted)
    weights = sum_over(p, 0)
    p.div_(weights)
    log_weights = log(weights)  # so the logarithm of p is shifted - log_weights
    label = labels.unsqueeze(0)
    losses = (log_weights - shifted.gather(0, label).squeeze(0)).mul_(1 - smoothing)
    p.scatter_(0, label, p.gather(0, label).sub_(1 - smoothing))
    if smoothing:
        share = smoothing / classes
        losses += (log_weights * classes).sub_(sum_over(shifted, 0)).mul_(share)
        p -= share
    return losses.float(), p.t().to(torch.float32, memory_format=torch.contiguous_format)
