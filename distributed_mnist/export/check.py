"""Whether a file computes what the network computed that it was made of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.generated import draw
from ..errors import VerificationError
from .inference_module import About, Exported

BATCHES = (1, 2, 7, 64)
"""Numbers of images that are tried: one, two, an odd number, and enough to choose other kernels."""
TOLERANCE = 2e-5
"""Greatest difference of logits, as a fraction of the largest of them.

fp32 rounds at 6e-8, and sums of a few thousand terms, added in another order through five layers, differ
by some ten times that; what is wrong (a weight, a pixel's scale, a transposed image) shows in the second
digit.
"""


@dataclass(frozen=True)
class Difference:
    """Between the logits of a file and those of its network."""

    greatest: float
    """Absolute."""
    allowed: float
    images: int


def test_images() -> list[Tensor]:
    """Drawn digits `(n, 28, 28)` uint8, a tensor for each of `BATCHES`."""
    images = torch.from_numpy(draw(sum(BATCHES), "export")[0])
    return list(images.split(list(BATCHES)))


@torch.no_grad()
def compare(run: Callable[[Tensor], Tensor], exported: Exported, name: str) -> Difference:
    """Raises `VerificationError`, naming the file, if they differ by more than rounding does."""
    greatest = largest = 0.0
    for images in test_images():
        wanted, got = exported(images), run(images)
        if got.shape != wanted.shape or got.dtype != torch.float32:
            raise VerificationError(
                f"{name} was not kept: for {len(images)} images it gives {got.dtype} {tuple(got.shape)}, "
                f"not torch.float32 {tuple(wanted.shape)}"
            )
        if not got.isfinite().all():
            raise VerificationError(f"{name} was not kept: its logits are not finite")
        if not torch.equal(got.argmax(1), wanted.argmax(1)):
            raise VerificationError(
                f"{name} was not kept: it takes a digit for another class than torch does"
            )
        greatest = max(greatest, (got - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    allowed = TOLERANCE * max(1.0, largest)
    if greatest > allowed:
        raise VerificationError(
            f"{name} was not kept: its logits differ from torch's by {greatest:.1e}, "
            f"rounding explains {allowed:.1e}"
        )
    return Difference(greatest, allowed, sum(BATCHES))


def require_same(got: About, wanted: About, name: str) -> None:
    """Raises `VerificationError` if the metadata did not come back as it was written."""
    if changed := sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)):
        raise VerificationError(f"{name} was not kept: its metadata changed in {', '.join(changed)}")
