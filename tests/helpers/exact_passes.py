"""Run models in exact arithmetic without a training run, and compare with float64."""

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distributed_mnist.exact.initial_values import normal
from distributed_mnist.exact.module import ExactModule
from distributed_mnist.exact.passes.evaluation_pass import EvaluationPass
from distributed_mnist.exact.passes.training_pass import TrainingPass
from distributed_mnist.exact.products.interface import Products
from distributed_mnist.exact.scales import Scales


def noise(*shape: int, key: str = "noise") -> Tensor:
    """Return float32 normal values."""
    return normal(shape, key).float()


class ExactRun:
    """A model with scales from all of these images. The loss is the sum of logits times fixed noise."""

    def __init__(self, model: nn.Module, images: Tensor, products: Products | None = None) -> None:
        self.model, self.images = model, images
        self.pass_ = TrainingPass(model, Scales(torch.device("cpu")))
        if products is not None:
            self.pass_.products = products
        self.module = ExactModule(model, self.pass_)
        model.train()
        self.image_gradients: list[Tensor] = []
        self.pass_.begin_step()
        self._pass(range(len(images)), starting=True)
        self.pass_.end_first_pass()

    def _pass(self, samples: range, *, starting: bool = False) -> Tensor:
        self.pass_.begin_pass(starting=starting)
        self.module.key_draws("dropout", 0, first=samples.start)
        images = self.images[samples.start : samples.stop].clone().requires_grad_()
        logits = self.module(images)
        weights = noise(len(self.images), *logits.shape[1:], key="loss")
        torch.autograd.backward([logits], [weights[samples.start : samples.stop]])
        self.pass_.end_pass()
        assert images.grad is not None
        self.image_gradients.append(images.grad)
        return logits.detach()

    def step(self, cuts: Sequence[int] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits, the gradient by the images, and the parameters' gradients, of passes cut here."""
        self.pass_.begin_step()
        self.image_gradients = []
        edges = [0, *cuts, len(self.images)]
        logits = [self._pass(range(a, b)) for a, b in itertools.pairwise(edges)]
        return torch.cat(logits), torch.cat(self.image_gradients), self.pass_.gradients()


def in_float64(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return what `ExactRun.step` returns, from torch's autograd."""
    model = copy.deepcopy(model).double().train()
    images = images.double().requires_grad_()
    logits = model(images)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = (logits * noise(*logits.shape, key="loss")).sum()
    of_images, *others = torch.autograd.grad(
        total, [images, *parameters], allow_unused=True, materialize_grads=True
    )
    return logits.detach(), of_images, others


def compare(model: nn.Module, images: Tensor, *, tolerance: float = 2e-3) -> ExactRun:
    """Check a model's results and gradients against float64, and that any cut gives the same bits.

    An evaluation must be close too.
    """
    run = ExactRun(model, images)
    whole = run.step()
    for found, expected in zip(flat(whole), flat(in_float64(model, images)), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), found - expected
    assert same(whole, run.step([1, 3]))
    with torch.no_grad():
        evaluated = ExactModule(model, EvaluationPass(torch.device("cpu")))(images.clone())
    assert (evaluated - whole[0]).abs().max() <= tolerance * evaluated.abs().max()
    return run


def flat(results: tuple[Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    """Return logits and gradients as a flat list."""
    return [*results[:2], *results[2]]


def same(a: tuple[Tensor, Tensor, list[Tensor]], b: tuple[Tensor, Tensor, list[Tensor]]) -> bool:
    """Return whether two results are equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
