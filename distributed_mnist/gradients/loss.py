"""Cross-entropy, and its gradient by the formula: two numbers a class, where autograd would take a
graph."""

from torch import Tensor

_WHOLE = 64  # samples: a multiple of what any processor's vectors hold


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Each sample's loss in nats, `(n,)`, and its gradient by the logits, `(n, classes)`.

    With `p = softmax(logits)` and the target `q`, which is `1 - smoothing` at the label and
    `smoothing / classes` more at every class, the loss is `-sum(q * log(p))` and its gradient `p - q`
    (Szegedy and others, "Rethinking the Inception architecture", 2016). `logits` are float32 `(n,
    classes)`, `labels` int64 `(n,)`. A sample's numbers have the same bits in any company.
    """
    count, classes = logits.shape
    # A row a class, not a row a sample: torch's kernel for short rows takes fifteen times as long. Rows
    # filled up, because what is left over from whole vectors is computed by other instructions, with other
    # last bits.
    rows = logits.new_zeros((classes, -(-count // _WHOLE) * _WHOLE))
    rows[:, :count] = logits.detach().t()
    log_p = rows.log_softmax(0)
    label = labels.unsqueeze(0)
    losses = log_p.gather(0, label).squeeze(0) * (smoothing - 1)
    if smoothing:
        losses -= _sum(log_p)[:count] * (smoothing / classes)
    p = log_p.exp_()
    p.scatter_(0, label, p.gather(0, label) - (1 - smoothing))
    if smoothing:
        p -= smoothing / classes
    return losses, p[:, :count].t().contiguous()


def _sum(rows: Tensor) -> Tensor:
    """One after the other: in torch's own sum over rows the order depends on their length."""
    total = rows[0].clone()
    for row in rows[1:].unbind():
        total += row
    return total
