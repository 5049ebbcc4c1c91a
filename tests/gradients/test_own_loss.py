"""Test that a user's own loss is what autograd makes of it, and that one that mixes samples is refused."""

import pytest
import torch

from distributed_mnist.config import Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.gradients.loss import cross_entropy, make_loss

CPU = torch.device("cpu")


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 10, generator=generator), torch.randint(10, (count,), generator=generator)


def test_smoothing_of_ones_own_is_the_built_in() -> None:
    logits, labels = batch(70)
    own = make_loss(Recipe(loss="user_functions:smoothed"), 10, CPU)(logits, labels, [30, 0, 40])
    torch.testing.assert_close(own, cross_entropy(logits, labels, 0.1))


def test_the_bits_of_a_shard_do_not_depend_on_the_others() -> None:
    logits, labels = batch(70)
    own = make_loss(Recipe(loss="user_functions:focal"), 10, CPU)
    both, first, second = (
        own(logits, labels, [33, 37]),
        own(logits[:33], labels[:33], [33]),
        own(logits[33:], labels[33:], [37]),
    )
    for together, a, b in zip(both, first, second, strict=True):
        assert torch.equal(together, torch.cat((a, b)))


def test_it_is_the_same_where_nothing_else_has_gradients() -> None:
    logits, labels = batch(20)  # as when batch norms' statistics are computed again
    own = make_loss(Recipe(loss="user_functions:focal"), 10, CPU)
    with torch.no_grad():
        found = own(logits, labels, [20])
    torch.testing.assert_close(found, own(logits, labels, [20]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mean", r'returns shape \(\) for 23 samples, .* as with reduction="none"'),
        ("divided", "one sample's loss depends on the other samples or on their number"),
        ("centred", "one sample's loss depends on the other samples or on their number"),
        ("hardest", "one sample's loss depends on the other samples or on their number"),
        ("noisy", "it draws random numbers or keeps state"),
        ("infinite", "not finite for random logits"),
        ("constant", "cannot be differentiated"),
        ("Lion", r"it fails on logits \(23, 10\) and labels \(23,\): "),
        ("none", "has no attribute 'none'"),
    ],
)
def test_a_loss_that_cannot_be_used(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=f"--loss user_functions:{name}: .*{problem}"):
        make_loss(Recipe(loss=f"user_functions:{name}"), 10, CPU)
