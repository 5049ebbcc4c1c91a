"""Check that an exported file computes the same logits as the original network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MNIST_SHAPE, ImageShape
from ..data.generated import draw
from ..data.split import as_stored
from ..errors import VerificationError
from .inference_module import InferenceModule, Metadata

BATCHES = (1, 2, 7, 64)
"""Batch sizes to compare: one, two, an odd number, and one large enough to select other kernels."""
TOLERANCE = 2e-5
"""Largest allowed difference of logits, as a fraction of the largest logit.

fp32 rounds at 6e-8. Sums of a few thousand terms in a different order, through five layers, differ by about
ten times that. A real error (a wrong weight or pixel scale, a transposed image) changes the second digit.
"""


@dataclass(frozen=True)
class Difference:
    """Difference between the logits of a file and those of its network."""

    greatest: float
    """The greatest absolute difference."""
    allowed: float
    images: int
    """Number of images compared."""


def sample_images(shape: ImageShape) -> list[Tensor]:
    """Generated digits, uint8 `(n, h, w)` or `(n, h, w, 3)`, one tensor for each of `BATCHES`.

    They are scaled to the size of the network's images, and each channel has another digit.
    """
    channels, height, width = shape
    digits = torch.from_numpy(draw(channels * sum(BATCHES), "export")[0]).view(
        -1, channels, *MNIST_SHAPE[1:]
    )
    images = as_stored(F.interpolate(digits, (height, width))).contiguous()
    return list(images.split(list(BATCHES)))


@torch.no_grad()
def compare_logits(run: Callable[[Tensor], Tensor], module: InferenceModule, path: str) -> Difference:
    """Compare the outputs of `run`, read back from the file at `path`, with those of `module`.

    Raises `VerificationError` if they differ by more than rounding explains.
    """
    greatest = largest = 0.0
    for images in sample_images(module.image_shape):
        expected, actual = module(images), run(images)
        if actual.shape != expected.shape or actual.dtype != torch.float32:
            returned = f"for {len(images)} images it returns {actual.dtype} {tuple(actual.shape)}"
            raise not_kept(path, f"{returned}, not torch.float32 {tuple(expected.shape)}")
        if not actual.isfinite().all():
            raise not_kept(path, "its logits are not finite")
        if not torch.equal(actual.argmax(1), expected.argmax(1)):
            raise not_kept(path, "it predicts a different class for a digit from torch")
        greatest = max(greatest, (actual - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    allowed = TOLERANCE * max(1.0, largest)
    if greatest > allowed:
        by = f"{greatest:.1e}, but rounding explains only {allowed:.1e}"
        raise not_kept(path, f"its logits differ from torch's by {by}")
    return Difference(greatest, allowed, sum(BATCHES))


def require_same_metadata(actual: Metadata, expected: Metadata, path: str) -> None:
    """Raise `VerificationError` if the metadata read back differs from what was written."""
    keys = expected.keys() | actual.keys()
    if changed := sorted(key for key in keys if expected.get(key) != actual.get(key)):
        raise not_kept(path, f"its metadata changed in {', '.join(changed)}")


def not_kept(path: str, problem: str) -> VerificationError:
    """Make the error for a file that failed the check and was removed."""
    return VerificationError(f"{path} was not kept: {problem}")
