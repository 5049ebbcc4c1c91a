"""Test that the metrics equal those of a plain loop over single images."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed_mnist.common.digest import digest
from distributed_mnist.common.placement import ALONE
from distributed_mnist.common.random_keys import random_bits
from distributed_mnist.config import Precision
from distributed_mnist.data.broadcast import Data
from distributed_mnist.data.split import Split
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError
from distributed_mnist.models.build import build, forward
from distributed_mnist.training.evaluate import CHUNK, Evaluation, _score, _score_exactly, evaluate

WORLD = World(ALONE, torch.device("cpu"), "none")
MEAN, STD = 0.1307, 0.3081


def split(count: int, classes: int = 10) -> Split:
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
    return Split(images, torch.from_numpy(rng.integers(0, classes, count).astype(np.uint8)))


def scored(model: nn.Module, on: Split, classes: int = 10, precision: Precision = "fp32") -> Evaluation:
    data = Data(on, on, "test", tuple(map(str, range(classes))), MEAN, STD, "", "")
    return evaluate(model, data, WORLD, precision)


@torch.no_grad()
def one_by_one(model: nn.Module, on: Split, classes: int = 10) -> tuple[float, list[list[int]]]:
    """Return mean loss and confusion matrix, computed one image at a time in float64."""
    total, confusion = 0.0, [[0] * classes for _ in range(classes)]
    for image, label in zip(on.images, on.labels.tolist(), strict=True):
        logits = model(((image.float() / 255 - MEAN) / STD).reshape(1, 1, 28, 28))[0].double()
        total -= float(torch.log_softmax(logits, 0)[label])
        confusion[label][int(logits.argmax())] += 1
    return total / len(on), confusion


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 33])
def test_the_same_as_a_plain_loop(count: int) -> None:
    model, on = build("mlp", 10, seed=0), split(count)
    loss, confusion = one_by_one(model, on)
    got = scored(model, on)
    assert got.loss == pytest.approx(loss, rel=1e-6)
    assert got.confusion == confusion
    assert got.images == count
    assert got.correct == sum(confusion[i][i] for i in range(10))
    assert got.accuracy == got.correct / count


def test_exact_scores_are_the_others_up_to_rounding() -> None:
    noise = torch.from_numpy((random_bits(350, "logits") % np.uint64(1000)).astype(np.float32))
    logits, labels = noise.view(50, 7) * 0.01 - 5, torch.arange(50) % 7
    exact, other = _score_exactly(logits, labels), _score(logits, labels)
    torch.testing.assert_close(exact, other, rtol=1e-5, atol=1e-7, check_dtype=False)
    # The digest was computed once; a machine with another one breaks the promise.
    assert digest(exact)[:16] == "47c95664ff3dd58c"
    equal = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [math.nan, 0.0, 0.0]])
    loss, _, predicted = _score_exactly(equal, torch.tensor([2, 2, 2]))
    assert predicted.tolist() == [1, 0, 2]
    assert loss.isnan()


def test_zero_has_no_sign_when_logits_are_compared() -> None:
    """A product of integers may be -0 with one library and 0 with another."""

    class Zeros(nn.Module):
        zero = 0.0

        def forward(self, images: Tensor) -> Tensor:
            self.zero = -self.zero
            return images.new_full((len(images), 10), self.zero)

    assert scored(Zeros(), split(5)).images == 5


def test_a_confusion_matrix_of_known_guesses() -> None:
    """The model reads its prediction from the first pixel."""

    class Reader(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            guess = (images[:, 0, 0, 0] * STD + MEAN).mul(255).round().long()
            return nn.functional.one_hot(guess, 3).float()

    guesses, truths = [0, 0, 1, 2, 2, 2, 1], [0, 1, 1, 2, 2, 0, 0]
    images = torch.zeros(7, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor(guesses)
    got = scored(Reader(), Split(images, torch.tensor(truths, dtype=torch.uint8)), classes=3)
    assert got.confusion == [[1, 1, 1], [1, 1, 0], [0, 0, 2]]  # rows are true
    assert (got.correct, got.images, got.accuracy) == (4, 7, 4 / 7)
    hit, miss = -math.log(math.e / (math.e + 2)), -math.log(1 / (math.e + 2))
    assert got.loss == pytest.approx((4 * hit + 3 * miss) / 7, rel=1e-6)


def test_more_classes_than_occur() -> None:
    got = scored(build("linear", 47, seed=0), split(100, classes=5), classes=47)
    assert len(got.confusion) == 47
    assert all(len(row) == 47 for row in got.confusion)
    assert sum(map(sum, got.confusion[:5])) == got.images == 100


@pytest.mark.parametrize("training", [True, False])
def test_in_evaluation_mode_and_then_as_it_was(training: bool) -> None:
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[tuple[bool, bool]] = []
            self.inner = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(784, 10))

        def forward(self, images: Tensor) -> Tensor:
            self.modes.append((self.training, self.inner.training))
            return self.inner(images)

    model = Spy().train(training)
    first, second = scored(model, split(300)), scored(model, split(300))
    assert first == second  # dropout is off
    assert set(model.modes) == {(False, False)}
    assert model.training is training
    assert model.inner.training is training
    model.inner.train(not training)  # a user may freeze a part
    with pytest.raises(UsageError, match="expected logits"):
        scored(model, split(300), classes=11)
    assert (model.training, model.inner.training) == (training, not training)


def test_nothing_is_left_behind() -> None:
    """No gradients, no changed weights, no changed images."""
    model, on = build("linear", 10, seed=0), split(300)
    images, weights = on.images.clone(), [p.detach().clone() for p in model.parameters()]
    scored(model, on)
    assert torch.equal(on.images, images)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_precision() -> None:
    model, images = build("mlp", 10, seed=0), torch.randn(20, 1, 28, 28)
    exact, half = forward(model, images, "fp32"), forward(model, images, "bf16")
    assert exact.dtype == half.dtype == torch.float32
    assert torch.equal(exact, model(images))
    assert not torch.equal(exact, half)
    assert torch.allclose(exact, half, atol=0.03)
    on = split(300)
    assert scored(model, on, precision="bf16").loss == pytest.approx(scored(model, on).loss, rel=0.01)
