"""List the test images that a model misclassifies, for reports."""

import base64
from typing import Any

import torch

from ..data.split import Split
from .evaluate import Evaluation

MAX_MISTAKES = 200
"""The maximum number of mistakes to list."""


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
