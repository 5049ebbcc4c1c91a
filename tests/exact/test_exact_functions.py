"""Test each layer's results and gradients, in exact arithmetic, against float64 and in any cut."""

from collections.abc import Callable
from typing import Any

import exact_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_passes import ExactRun, compare, noise, same
from torch import Tensor, nn

from distributed_mnist.exact.products.float64 import Float64Products
from distributed_mnist.exact.products.int8 import Int8Products
from distributed_mnist.exact.refusal import Refused


class Model(nn.Module):
    """A function of images and of parameters of these shapes, or of modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: Any) -> None:
        super().__init__()
        self.function = function
        self.parameters_ = nn.ParameterList(
            [
                nn.Parameter(noise(*part, key=f"{i}"))
                for i, part in enumerate(parts)
                if isinstance(part, tuple)
            ]
        )
        self.modules_ = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        for name, parameter in self.modules_.named_parameters():  # the same in every run of the test
            parameter.data = noise(*parameter.shape, key=name) * (1 if parameter.ndim == 1 else 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters_, *self.modules_)


ROWS, IMAGES = noise(7, 5, 6), noise(7, 3, 9, 8)

BROADCASTING = {
    "sum": Model(lambda x, p: p - x + p, (5, 6)),
    "product": Model(lambda x, p: x * p, (5, 1)),
    "quotient": Model(lambda x, p, q: x / p + q / (x * x + 2), (6,), (5, 1)),
    "numbers": Model(lambda x, p: 2 / (x * x + 1) + x / 3 - 1 + (1 - x) + p, (6,)),
    "in place": Model(lambda x, p: x.clone().add_(p).mul_(p).div_(3), (6,)),
    "within a sample": Model(
        lambda x, p: x * x.mean(1, keepdim=True) + x[:, :1].expand(-1, 5, -1) + p, (6,)
    ),
    "class token": Model(
        lambda x, p, q: torch.cat([p.expand(len(x), -1, -1) + q[:, :1], x], 1) * q, (1, 1, 6), (1, 6, 6)
    ),
    "index": Model(lambda x, p: x + p[torch.tensor([0, 1, 1, 0, 2])], (3, 6)),
    "view": Model(lambda x, p: x * p.view(5, 2, 3).transpose(1, 2).reshape(5, 6), (30,)),
    "queries": Model(lambda x, p, w: F.linear(p.expand(len(x), -1, -1), w) * x, (1, 5, 4), (6, 4)),
    "slices as weights": Model(lambda x, p: F.linear(x, p[2:5], p[0, :3]), (8, 6)),
    "torch's names": Model(lambda x, p: torch.softmax(input=F.linear(input=x, weight=p), dim=1), (4, 6)),
    "NumPy's names": Model(lambda x, p: x.mean(axis=1, keepdims=True) * p, (6,)),
    "quotient, then in place": Model(lambda x, p: ((x * p) / 3).add_(1) + (p / (x * x + 2)).relu_(), (6,)),
    "without gradients": Model(lambda x, p, m: x * p + m(_without_gradients(x)), (6,), nn.Linear(6, 6)),
    "one parameter twice": Model(lambda x, p: F.linear(F.linear(x, p).tanh(), p.t()) + p[0, :1], (4, 6)),
}
PRODUCTS = {
    "right": Model(lambda x, p: x @ p, (6, 3)),
    "left": Model(lambda x, p: p @ x, (4, 5)),
    "vector": Model(lambda x, p: x @ p, (6,)),
    "activations": Model(lambda x, p: (x @ x.transpose(1, 2) + p) @ x, (5,)),
    "attention": Model(lambda x, p: F.scaled_dot_product_attention(x, x * p, x, is_causal=True), (6,)),
    "heads": Model(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(6, 2, batch_first=True)),
    "cross": Model(lambda x, m: m(x, x.relu(), x)[0], nn.MultiheadAttention(6, 2, batch_first=True)),
    "weights": Model(
        lambda x, m: m(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))[1],
        nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "softmax": Model(
        lambda x, p: F.softmax(x, -1) * p + F.log_softmax(x, 1) + x.logsumexp(2, keepdim=True), (6,)
    ),
}
WITHIN_SAMPLES = {
    "layer norm": Model(lambda x, m, k: m(x) + k(x), nn.LayerNorm([5, 6]), nn.LayerNorm(6)),
    "rms norm": Model(lambda x, m: m(x), nn.RMSNorm(6)),
    "reductions": Model(lambda x, p: x.sum(1) + x.amax((1,)) + x.max(1).values + p, (6,)),
    "powers": Model(lambda x, p: x**2 + x.square() + x**3 + p, (6,)),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "elu": F.elu, "selu": F.selu, "mish": F.mish,
    "softplus": F.softplus, "logsigmoid": F.logsigmoid, "exp": torch.exp,
    "log": lambda x: torch.log(x * x + 1), "sqrt": lambda x: torch.sqrt(x * x + 1),
    "leaky": lambda x: F.leaky_relu(x, 0.1), "relu6": F.relu6, "clamp": lambda x: x.clamp(-1, 0.5),
}  # fmt: skip


def after_convolution(function: Callable[..., Tensor], *parts: Any, **settings: Any) -> Model:
    """Return a model that applies a function to a convolution of `IMAGES`."""
    return Model(
        lambda x, conv, *others: function(conv(x), *others), nn.Conv2d(3, 6, 3, **settings), *parts
    )


CONVOLUTIONS = {
    "plain": after_convolution(lambda x: x),
    "stride and padding": after_convolution(lambda x: x, stride=2, padding=1),
    "same": after_convolution(lambda x: x, padding="same", dilation=2),
    "groups": after_convolution(lambda x: x, groups=3, bias=False, stride=(1, 2)),
    "one column": Model(lambda x, p: F.conv2d(x, p, stride=2, groups=3), (3, 1, 3, 1)),
    "relu in place": after_convolution(nn.ReLU(inplace=True)),
    "one weight with two strides": Model(
        lambda x, p: F.conv2d(x, p, padding=1)[:, :, :4, :3] + F.conv2d(x, p, stride=2), (3, 3, 3, 3)
    ),
    "one weight in groups": Model(
        lambda x, p: F.conv2d(x[:, 1:2], p) + F.conv2d(x, p, groups=3), (3, 1, 3, 3)
    ),
    "norm, then in place": after_convolution(
        lambda x, m: F.relu(m(x), inplace=True), nn.GroupNorm(2, 6, affine=False), bias=False
    ),
    "group norm": after_convolution(lambda x, m: m(x), nn.GroupNorm(2, 6)),
    "instance norm": after_convolution(lambda x, m: m(x), nn.InstanceNorm2d(6, affine=True), bias=False),
    "average pooling": after_convolution(
        lambda x: F.avg_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    ),
    "adaptive pooling": after_convolution(lambda x: F.adaptive_avg_pool2d(x, (None, 3))),
    "max pooling": after_convolution(lambda x: F.max_pool2d(x, 3, 2, 1) + F.adaptive_max_pool2d(x, 1)),
}


@pytest.mark.parametrize("name", [*BROADCASTING, *PRODUCTS, *WITHIN_SAMPLES])
def test_rows(name: str) -> None:
    compare((BROADCASTING | PRODUCTS | WITHIN_SAMPLES)[name], ROWS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise(name: str) -> None:
    compare(Model(lambda x, p: FUNCTIONS[name](x * p), (6,)), ROWS)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_images(name: str) -> None:
    compare(CONVOLUTIONS[name], IMAGES)


def test_max_pooling_gives_the_gradient_to_the_first_of_equal_maxima() -> None:
    run = ExactRun(Model(lambda x, p: F.max_pool2d(x + p, 2), (1,)), torch.zeros(2, 1, 4, 4))
    gradient = run.step()[1]
    assert gradient[:, :, ::2, ::2].all() and gradient.count_nonzero() == 8


def test_as_many_samples_as_a_size_of_the_model_change_nothing() -> None:
    run = ExactRun(Model(lambda x, p: x * p.expand(5, 6) + x, (6,)), ROWS)
    assert same(run.step(), run.step([5]))


def test_copies_of_a_weight_count_as_terms() -> None:
    run = ExactRun(Model(lambda x, p: F.linear(x, p.expand(4, 6)), (1, 6)), ROWS)
    assert run.pass_.sums.most_products == 4 * 7 * 5


@pytest.mark.parametrize("make", [exact_models.resnet, exact_models.vit, exact_models.separable])
def test_products_and_cuts_change_nothing(make: Callable[[int], nn.Module]) -> None:
    images, model = noise(9, 1, 28, 28), make(10)
    run = ExactRun(model, images, Float64Products())
    whole = run.step()
    assert same(whole, run.step([2, 3])) and same(whole, run.step(range(1, 9)))
    assert same(whole, ExactRun(model, images, Int8Products()).step([5]))


def test_what_the_logits_do_not_depend_on_needs_no_scale() -> None:
    def with_dead_branch(x: Tensor, layer: nn.Module, unused: nn.Module) -> Tensor:
        unused(layer(x))
        return layer(x)

    run = ExactRun(Model(with_dead_branch, nn.Linear(6, 6), nn.Linear(6, 6)), ROWS)
    assert run.pass_.scales.complete()
    assert not run.step()[2][2].any()


def test_dropout_keeps_a_fraction_and_depends_on_the_sample() -> None:
    run = ExactRun(Model(lambda x, p: F.dropout(x * 0 + p, 0.25), (1,)), noise(64, 10, 10))
    kept = run.step()[0] != 0
    assert 0.72 < kept.float().mean() < 0.78
    assert not torch.equal(kept[0], kept[1])
    assert same(run.step(), run.step([1, 7, 40]))


def test_frozen_and_unused_parameters() -> None:
    model = Model(lambda x, p, q, m: m(x) + p, (6,), (3,), nn.Linear(6, 6))
    model.modules_[0].requires_grad_(False)
    of_p, of_q = ExactRun(model, ROWS).step()[2]
    assert of_p.any() and not of_q.any()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, p: x * torch.cumsum(x, 1), "torch.cumsum has no exact form"),
        (lambda x, p: x * p * p.sigmoid(), "torch.Tensor.sigmoid of a parameter alone"),
        (lambda x, p: F.linear(x, p.view(1, 6) * 2), "torch.Tensor.mul of a parameter alone"),
        (lambda x, p: x * p if x.sum(1).sum(1)[0] > 0 else x, "a model cannot decide by values"),
        (lambda x, p: torch.add(x, p, alpha=2), "alpha"),
        (lambda x, p: torch.add(x, 2, p), "alpha"),
        (lambda x, p: x * p * torch.arange(0, 0.6, 0.1), "whole numbers"),
        (lambda x, p: (x.to(torch.complex64) * 1j).real * p, "complex64"),
        (lambda x, p: x.to(torch.int32) * p, "int32"),
        (lambda x, p: (x * p).sum(()) + p, "without dim"),
        (lambda x, p: torch.zeros(len(x), 5, 6).copy_((x * p)[:, :1]), "another shape"),
        (lambda x, p: (x * p)[:, torch.tensor([0, 0])], "use slices"),
        (lambda x, p: (x * p)[:, np.array([0, 0, 0])], "use slices"),
        (lambda x, p: (x * p)[:, (0, 0, 0)], "use slices"),
        (lambda x, p: _hooked(x * p), "register_hook"),
        (lambda x, p: _saved_by_hooks(x * p), "checkpointing"),
        (lambda x, p: F.dropout((x * p).transpose(0, 1)), "first dimension"),
        (lambda x, p: _Twice.apply(x * p) + p, "autograd.Function"),
        (lambda x, p: (x * p).double(), "Tensor.double has no exact form"),
    ],
)
def test_refused(function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(Refused, match=message):
        ExactRun(Model(function, (6,)), ROWS)


def _hooked(x: Tensor) -> Tensor:
    x.register_hook(torch.exp)
    return x


def _saved_by_hooks(x: Tensor) -> Tensor:
    """As `torch.utils.checkpoint` does, whose import takes seconds."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return x.tanh()


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.tanh()


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


def test_other_layers_for_other_images_are_refused() -> None:
    used = [True]
    run = ExactRun(Model(lambda x, p: x * p if used[0] else x + 0 * x, (6,)), ROWS)
    used[0] = False
    with pytest.raises(Refused, match="layers that differ between images"):
        run.step()
