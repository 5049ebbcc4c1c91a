"""The test images that a model takes for something else: what a person wants to see of them."""

import base64
from typing import Any

import torch

from ..data.split import Split
from .evaluate import Evaluation

MOST = 200
"""How many are kept."""


def mistakes(result: Evaluation, split: Split) -> list[dict[str, Any]]:
    """What went wrong in an evaluation of `split`, the surest first, at most `MOST`; plain values.

    Each has `index` in the split, `label`, `predicted`, `confidence` (of the wrong class, 0 to 1) and
    `image`, the 28 by 28 bytes in base64.
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
        for index in wrong[order][:MOST].tolist()
    ]
