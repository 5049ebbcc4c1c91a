"""What a trained network takes as images, and what it refuses, instead of a silently wrong answer."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distributed_mnist.config import Recipe
from distributed_mnist.errors import DataError
from distributed_mnist.inference.pixels import as_pixels
from distributed_mnist.inference.trained import Trained

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
PIXELS[0].flat[:256] = range(256)
TENSOR = torch.from_numpy(PIXELS)

TAKEN: dict[str, Any] = {
    "array": PIXELS,
    "tensor": TENSOR,
    "channel": PIXELS[:, None],
    "list of arrays": list(PIXELS),
    "list of tensors": list(TENSOR),
    "nested list": PIXELS.tolist(),
    "list of pictures": [Image.fromarray(image) for image in PIXELS],
    "reversed twice": PIXELS[::-1].copy()[::-1],
    "ToTensor": TENSOR.unsqueeze(1).float() / 255,
    **{dtype: PIXELS.astype(dtype) for dtype in ("i2", ">u2", "i4", "i8", "u4", "u8")},
    **{f"floats {dtype}": (PIXELS / 255).astype(dtype) for dtype in ("f2", "f4", "f8", ">f8")},
    "bfloat16": (TENSOR / 255).bfloat16(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_same_pixels_in_any_form(name: str) -> None:
    taken = as_pixels(TAKEN[name])
    assert taken.dtype == torch.uint8
    assert torch.equal(taken, TENSOR)


@pytest.mark.parametrize("one", [PIXELS[0], TENSOR[0], PIXELS[0] / 255, Image.fromarray(PIXELS[0])])
def test_one_image(one: Any) -> None:
    assert torch.equal(as_pixels(one), TENSOR[:1])


REFUSED: dict[str, tuple[Any, str]] = {
    "floats to 255": (PIXELS.astype("f4"), "not float32 from 0 to 255"),
    "normalised": (
        (PIXELS / 255 - 0.5) * 4,
        "from -2 to 2; do not normalise them, because that is done here",
    ),
    "nan": (np.full((28, 28), np.nan), "not float64 from nan to nan"),
    "one nan": (np.where(PIXELS == 255, np.nan, 0.5), "from nan to nan"),
    "infinity": (np.full((28, 28), np.inf, "f4"), "not float32 from inf to inf"),
    "negative": (PIXELS.astype("i2") - 1, "not int16 from -1 to 254"),
    "large": (np.full((28, 28), 2**63, "u8"), r"not uint64 from 9.22337e\+18"),
    "bool": (PIXELS > 127, "not bool"),
    "complex": (PIXELS * 1j, "not complex128"),
    "other size": (np.zeros((2, 32, 32), "u1"), r"not of shape \(2, 32, 32\)"),
    "flat": (PIXELS.reshape(3, 784), r"not of shape \(3, 784\)"),
    "channels last": (PIXELS[..., None], r"not of shape \(3, 28, 28, 1\)"),
    "colour": (Image.new("RGB", (28, 28)), r"not of shape \(28, 28, 3\)"),
    "colours": (np.zeros((2, 3, 28, 28), "u1"), r"not of shape \(2, 3, 28, 28\)"),
    "number": (5, r"not of shape \(\)"),
    "no list": ([], r"not of shape \(0,\)"),
    "ragged": ([PIXELS[0], PIXELS[0, :9]], "not this list"),
    "objects": (np.array([object()]), "not this ndarray"),
    "path": ("picture.png", "not this str"),
    "nothing": (None, "not this NoneType"),
    "sparse": (torch.zeros(1, 28, 28).to_sparse(), "not a sparse, quantised or meta tensor"),
    "meta": (torch.zeros(1, 28, 28, device="meta"), "not a sparse, quantised or meta tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    images, words = REFUSED[name]
    with pytest.raises(
        DataError, match=f"^images must be pixels from 0 to 255, or floats from 0 to 1, .*{words}"
    ):
        as_pixels(images)


def test_a_network_answers_the_same_for_any_form() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    names = tuple("0123456789")
    trained = Trained(network, Recipe(model="linear"), names, 0.13, 0.31, "mnist", {}, "here")
    logits = trained.logits(PIXELS)
    assert torch.equal(trained.logits(PIXELS[:, None] / 255), logits)
    assert torch.equal(trained.predict(PIXELS.tolist()), logits.argmax(1))
    assert trained.probabilities(PIXELS[1]).shape == (1, 10)
    assert trained.predict(PIXELS[:0]).shape == (0,)
    assert np.array_equal(PIXELS, TENSOR)  # it does not change the caller's images
    with pytest.raises(DataError, match="floats from 0 to 1"):
        trained.predict(PIXELS.astype("f4"))
