"""Test who is named when results differ, and that a check finds wrong gradients and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.random import default_rng
from ranks import run_ranks
from torch import Tensor, nn

from distributed_mnist.common.placement import ALONE
from distributed_mnist.config import Recipe
from distributed_mnist.data.broadcast import Data
from distributed_mnist.data.split import Split
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import DmnistError, TrainingError, UsageError
from distributed_mnist.gradients.agreement import Disagreement, Results, judge
from distributed_mnist.gradients.cross_check import CrossCheck
from distributed_mnist.gradients.ddp import DdpGradients
from distributed_mnist.gradients.interface import compute_gradients
from distributed_mnist.gradients.loss import cross_entropy
from distributed_mnist.gradients.setup import make_tree_gradients
from distributed_mnist.gradients.shard_gradients import ShardGradients
from distributed_mnist.gradients.tree_sum import shard_sizes
from distributed_mnist.models.inspection import ModelProperties
from distributed_mnist.training.evaluate import evaluate

CPU = torch.device("cpu")
PLAIN = ModelProperties(parameters=0, draws_random_numbers=False, unused=())


def results(alone: str, fresh: str = "", usual: str = "") -> Results:
    """One rank's digests, as letters; by default all are those of `alone`."""
    return Results(list(usual), list(alone), list(fresh or alone))


@pytest.mark.parametrize(
    ("everyone", "expected"),
    [
        ([results("ab")], Disagreement("state")),
        ([results("ab"), results("cd"), results("ab")], Disagreement("state")),
        ([results("aa", "b")], Disagreement("copy")),
        ([results("aa", usual="b")], Disagreement("pass")),
        ([results("aa"), results("bb")], Disagreement("ranks", [[0], [1]])),
        ([results("aa"), results("bb"), results("aa")], Disagreement("rank", [[1]])),
        ([results("bb"), results("aa"), results("aa")], Disagreement("rank", [[0]])),
        ([results("aa"), results("aa"), results("ab")], Disagreement("rank", [[2]])),
        ([results("aa", "aab"), results("aa")], Disagreement("rank", [[0]])),
        ([results(x * 2) for x in "aabca"], Disagreement("rank", [[2, 3]])),
        ([results(x * 2) for x in "abab"], Disagreement("ranks", [[0, 2], [1, 3]])),
        ([results(x * 2) for x in "abc"], Disagreement("ranks", [[0], [1], [2]])),
    ],
)
def test_who_is_named(everyone: list[Results], expected: Disagreement) -> None:
    assert judge(everyone) == expected


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is `factor` times as large."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None  # type: ignore[attr-defined]


class Network(nn.Module):
    """Two layers, of which `fault` is said in words: what is wrong with it."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(784, 6), nn.Linear(6, 10)
        self.fault, self.calls, self.mean = fault, 0, 0.0
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(images.flatten(1)).relu()
        if self.fault == "gradient":
            hidden = Scaled.apply(hidden, 1.001)
        if self.fault == "last bit":
            hidden = Scaled.apply(hidden, 1 + 2**-23)
        if self.fault == "its own generator":
            hidden = hidden + torch.rand(hidden.shape, generator=self.generator)
        if self.fault == "a counter":
            hidden = hidden * self.calls
        if self.fault == "a late counter" and self.calls > 20:
            hidden = hidden * 2
        if self.fault == "an average":
            self.mean += 0.1 * (float(hidden.mean()) - self.mean)
            hidden = hidden - self.mean
        if self.fault == "evaluation" and not self.training:
            hidden = hidden.roll(1, 1)
        return self.last(hidden)


def check(world: World, model: nn.Module, passes: int = 0) -> None:
    """Prepare as a run does, make some passes, and check."""
    images = torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    sizes = shard_sizes(40, 8)
    gradients = make_tree_gradients(Recipe(model="mine", batch_size=40), world, model, PLAIN)

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        rows = slice(shards.start * 5, shards.stop * 5)
        logits = module(images[rows])
        return logits, cross_entropy(logits, logits.argmin(1))[1] / 40

    gradients.prepare(forward_shards, sizes)
    gradients.check(forward_shards, sizes)
    for _ in range(passes):
        compute_gradients(gradients, forward_shards, sizes)
    gradients.check(forward_shards, sizes)


def alone() -> World:
    return World(ALONE, CPU, "none")


@pytest.mark.parametrize("passes", [0, 3])
def test_a_check_changes_nothing(passes: int) -> None:
    torch.set_num_threads(1)
    model = Network()
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(5)
    check(alone(), model, passes)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fault", ["its own generator", "a counter", "an average", "a late counter"])
def test_state_between_passes_is_found(fault: str) -> None:
    with pytest.raises(UsageError, match=r"^--model mine: its gradients (change|differ)"):
        check(alone(), Network(fault), passes=21)


def test_a_model_that_uses_its_first_self_cannot_be_copied_but_checked() -> None:
    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net = Network()
            self.run: Callable[[Tensor], Tensor] = lambda images: net(images) * 1

        def forward(self, images: Tensor) -> Tensor:
            return self.run(images)

    check(alone(), Closure(), passes=2)
    wrong = Closure()
    wrong.net.fault = "a counter"
    with pytest.raises(UsageError):
        check(alone(), wrong)


def said(world: World, victim: int, fault: str) -> str:
    """Return what a group is told in which one rank's model is faulty."""
    torch.set_num_threads(1)
    model = Network(fault if world.rank == victim else "")
    rng = default_rng(0)
    split = Split(
        torch.from_numpy(rng.integers(0, 256, (600, 28, 28), "uint8")),
        torch.from_numpy(rng.integers(0, 10, 600).astype("uint8")),
    )
    data = Data(split, split, "mine", tuple("0123456789"), 0.1, 0.3, "", "")
    try:
        check(world, model, passes=13)
        evaluate(model, data, world, "fp32")
    except DmnistError as error:
        assert isinstance(error, TrainingError)
        return str(error)
    return ""


def each_said(world: World, victim: int) -> list[str]:
    return [said(world, victim, fault) for fault in ("", "gradient", "last bit", "a counter", "evaluation")]


def said_closely(world: World, victim: int) -> list[str]:
    """Return what a group is told that compares gradients up to rounding."""
    torch.set_num_threads(1)
    found = []
    images = torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        logits = module(images[shards.start * 5 : shards.stop * 5])
        return logits, cross_entropy(logits, logits.argmin(1))[1] / 40

    for fault in ("", "last bit", "gradient", "a counter"):
        model = Network(fault if world.rank == victim else "")
        checks = CrossCheck(world, 8, ShardGradients(model), None, "mine")
        try:
            for _ in range(3):
                checks.check_closely(forward_shards, shard_sizes(40, 8))
            found.append("")
        except TrainingError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_compared_up_to_rounding(size: int) -> None:
    everyone = run_ranks(said_closely, size, 1)
    assert all(said == everyone[0] for said in everyone)
    sound, last_bit, gradient, counter = everyone[0]
    assert sound == last_bit == gradient == ""  # the last one is a thousandth
    ranks, _, rest = counter.partition(" compute different gradients of the same images")
    assert ranks == f"--model mine: rank 1 and rank {2 % size}" and rest


def test_ddp_compares_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(CrossCheck, "check_closely", lambda *arguments: calls.append(arguments[2]))
    ddp = DdpGradients(Network(), alone(), 8, 8, (1, 28, 28))
    ddp.check(lambda module, shards: (torch.empty(0), torch.empty(0)), [5] * 8)
    assert calls == [[5] * 8]


@pytest.mark.parametrize(("size", "victim"), [(2, 1), (3, 2)])
def test_the_rank_is_named(size: int, victim: int) -> None:
    sound, *wrong = zip(*run_ranks(each_said, size, victim), strict=True)
    assert set(sound) == {""}
    for texts in wrong:
        assert len(set(texts)) == 1  # every rank ends with the same error
        both = texts[0].startswith("rank 0 (") and ") and rank 1 (" in texts[0]
        assert texts[0].startswith(f"rank {victim} (") or (size == 2 and both), texts[0]
