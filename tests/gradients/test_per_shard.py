"""Test several shards in one pass: each has autograd's gradient, and unsupported models are found."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from distributed_mnist.common.placement import ALONE
from distributed_mnist.config import MNIST_SHAPE, Precision
from distributed_mnist.distributed.world import World
from distributed_mnist.gradients.batch_invariance import is_batch_invariant, matches_autograd
from distributed_mnist.gradients.interface import compute_gradients
from distributed_mnist.gradients.loss import cross_entropy
from distributed_mnist.gradients.per_shard import HookedLayers
from distributed_mnist.gradients.tree import TreeGradients
from distributed_mnist.models.build import build, forward, place
from distributed_mnist.models.patch_conv import PatchConv
from distributed_mnist.models.zoo import MODELS, NarrowLinear

WORLD = World(ALONE, torch.device("cpu"), "none")
SMALL = (2, 8, 9)
"""Channels, height and width of small images; they have four classes."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, as with `tree`."""
    torch.set_num_threads(1)


class Corner(nn.Module):
    """Crops the corner of the first channel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1, : self.side, : self.side]


class LastChannels(nn.Module):
    """Puts the channels last, as `PatchConv` needs them."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)


class Rows(nn.Module):
    """Applies linear layers to each row and each column of an image: many rows per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(9, 5), nn.Linear(8, 3, bias=False)
        self.last = nn.Linear(2 * 5 * 3, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.rows(images).relu()
        return self.last(self.columns(hidden.transpose(2, 3)).tanh().flatten(1))


def convolved(features: int, *layers: nn.Module) -> nn.Module:
    """Return a model of these layers and a linear one."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 4))


def channels_last(model: nn.Module) -> nn.Module:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert any(not p.is_contiguous() for p in model.parameters())
    return model


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 4)),
    "two linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 4, bias=False)
    ),
    "narrow": lambda: nn.Sequential(nn.Flatten(), NarrowLinear(144, 4)),
    "linear on rows": Rows,
    "conv": lambda: convolved(5 * 6 * 7, nn.Conv2d(2, 5, 3), nn.ReLU()),
    "conv without bias": lambda: convolved(5 * 6 * 7, nn.Conv2d(2, 5, 3, bias=False), nn.ReLU()),
    "conv, stride and padding": lambda: convolved(
        5 * 4 * 10,
        nn.Conv2d(2, 5, 3, stride=(2, 1), padding=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(5, 5, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 5, (2, 3), bias=False),
    ),
    "conv, groups and dilation": lambda: convolved(
        6 * 4 * 5,
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, dilation=2, groups=2),
    ),
    "conv, channels last": lambda: channels_last(
        convolved(6 * 4 * 5, nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    ),
    "conv of one channel, channels last": lambda: channels_last(
        convolved(6 * 3 * 3, Corner(7), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    ),
    "patches": lambda: convolved(
        6 * 2 * 3, LastChannels(), PatchConv(2, 4, 3, stride=2), nn.ReLU(), PatchConv(4, 6, 2)
    ),
    "patches of one channel": lambda: convolved(
        6 * 3 * 3, Corner(7), LastChannels(), PatchConv(1, 4, 3), nn.ReLU(), PatchConv(4, 6, 3)
    ),
    "tiles": lambda: convolved(
        6, Corner(6), LastChannels(), PatchConv(1, 3, 3, stride=3), nn.ReLU(), PatchConv(3, 6, 2, stride=2)
    ),
}
SIZES = [(4, 4, 4), (1, 1), (5,), (3, 4, 3, 4), (1, 6, 2), (16, 16)]


def made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return SUPPORTED[kind]()


def drawn(n: int, shape: Sequence[int] = SMALL, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1_000 * seed + n)
    return torch.randn(n, *shape, generator=noise), torch.randint(classes, (n,), generator=noise)


def plain(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def rows_of(
    model: nn.Module, layers: HookedLayers, images: Tensor, labels: Tensor, sizes: Sequence[int],
    forward_pass: Callable[[nn.Module, Tensor], Tensor] = plain,
) -> Tensor:  # fmt: skip
    """Return each shard's gradient, `(shards, parameters)`, from one pass."""
    with layers.recording():
        logits = forward_pass(model, images)
    rows = torch.full((len(sizes), sum(p.numel() for p in layers.parameters)), torch.nan)
    layers.write_gradients(logits, cross_entropy(logits, labels)[1], sizes, layers.views(rows))
    return rows


def in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return its numbers in the parameter's memory order, which its strides give."""
    place = torch.zeros(parameter.shape, dtype=torch.int64)
    for axis, stride in enumerate(parameter.stride()):
        shape = [-1 if axis == other else 1 for other in range(parameter.ndim)]
        place += torch.arange(parameter.shape[axis]).view(shape) * stride
    return gradient.flatten()[place.flatten().argsort()]


def by_autograd(model: nn.Module, images: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the same from autograd, shard by shard, in float64."""
    wide = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    found = []
    for x, y in zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True):
        logits = torch.func.functional_call(model, wide, (x.double(),))
        loss = F.cross_entropy(logits, y, reduction="sum")
        gradients = torch.autograd.grad(loss, list(wide.values()))
        pairs = zip(gradients, model.parameters(), strict=True)
        found.append(torch.cat([in_memory_order(g, p) for g, p in pairs]))
    return torch.stack(found)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_each_shard_has_autograds_gradient(kind: str, sizes: tuple[int, ...]) -> None:
    model = made(kind)
    images, labels = drawn(sum(sizes))
    expected = by_autograd(model, images, labels, sizes)
    got = rows_of(model, HookedLayers(model), images, labels, sizes)
    assert got.shape == expected.shape
    for mine, its in zip(got, expected, strict=True):
        assert float((mine.double() - its).abs().max()) <= 5e-6 * float(its.abs().max())


@pytest.mark.parametrize("kind", ["linear", "conv, channels last", "patches of one channel"])
def test_in_bfloat16_it_is_autograds_too(kind: str) -> None:
    model, sizes = made(kind), (3, 4)
    images, labels = drawn(7)
    bf16 = partial(forward, precision="bf16")
    got = rows_of(model, HookedLayers(model), images, labels, sizes, bf16)
    expected = by_autograd(model, images, labels, sizes)
    assert float((got - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    assert float((got - expected).abs().max()) > 0


def test_every_pass_is_by_itself() -> None:
    """No numbers of one pass stay for the next, whose shards may have other sizes."""
    model = made("conv")
    layers = HookedLayers(model)
    images, labels = drawn(12)
    first = rows_of(model, layers, images, labels, (4, 4, 4))
    rows_of(model, layers, *drawn(5, seed=1), (2, 3))
    assert torch.equal(rows_of(model, layers, images, labels, (4, 4, 4)), first)


def test_a_shard_without_another_reads_nothing_of_it() -> None:
    model = made("conv, channels last")
    layers = HookedLayers(model)
    images, labels = drawn(9)
    before = rows_of(model, layers, images, labels, (2, 3, 4))
    images[2:5] = torch.nan
    after = rows_of(model, layers, images, labels, (2, 3, 4))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].isnan().any()


# ---- Which models are supported --------------------------------------------------------------------------


class Head(nn.Module):
    """Two linear layers on the pixels; subclasses add something unsupported."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(144, 6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)).relu())


class Loose(Head):
    """Has a parameter that belongs to none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


class Twice(Head):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.again(self.first(images.flatten(1)).relu()).relu()
        return self.last(self.again(hidden))


class Tied(Head):
    """Shares one matrix between two layers, as with word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.second.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        return self.last(self.third(self.second(hidden).relu()))


class Elsewhere(Head):
    """Uses a layer's weight outside its layer too."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.last.weight.sum()


class ALittleElsewhere(Head):
    """Does the same, with gradients far smaller than those of other layers."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        hidden = self.first(pixels) + F.linear(pixels, self.first.weight)
        return self.last(torch.ones(6) + 1e-4 * hidden)


class ByKeyword(Head):
    def forward(self, images: Tensor) -> Tensor:
        return self.last(input=self.first(images.flatten(1)).relu())


class Locked(Head):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Keeping(Head):
    """Keeps an activation, and cannot be copied after that."""

    def __init__(self) -> None:
        super().__init__()
        self(torch.zeros(1, 144))

    def forward(self, images: Tensor) -> Tensor:
        self.kept = self.first(images.flatten(1)).relu()
        return self.last(self.kept)


class OnlyElsewhere(Head):
    """Does not call a layer, but uses its parameters."""

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.first(images.flatten(1)).relu(), self.last.weight, self.last.bias)


class Unused(Head):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 3)


class InVain(Head):
    """Calls a layer and ignores its output."""

    def __init__(self) -> None:
        super().__init__()
        self.vain = nn.Linear(144, 3)

    def forward(self, images: Tensor) -> Tensor:
        self.vain(images.flatten(1))
        return super().forward(images)


class Overwritten(Head):
    """Changes a layer's output in place: its gradient is no longer that of the layer's output."""

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)).mul_(0.5).relu_())


class Scaled(Head):
    """Computes a weight from its parameter in each pass."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], *, bias: bool = True) -> None:
        super().__init__()
        self.first = wrap(nn.Linear(144, 6, bias=bias))


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved(layer: nn.Module) -> nn.Module:
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    return layer


def frozen(*names: str) -> nn.Module:
    model = Head()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    return model


def padded(mode: Any) -> nn.Module:
    return convolved(5 * 8 * 9, nn.Conv2d(2, 5, 3, padding=1, padding_mode=mode), nn.ReLU())


UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: convolved(144, nn.LayerNorm(9)),
    "group norm": lambda: convolved(4 * 6 * 7, nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
    "slopes to learn": lambda: convolved(144, nn.Flatten(), nn.Linear(144, 144), nn.PReLU()),
    "another kind of convolution": lambda: convolved(4 * 10 * 11, nn.ConvTranspose2d(2, 4, 3)),
    "a bilinear layer": lambda: nn.Sequential(Squared(), nn.Linear(3, 4)),
    "a loose parameter": Loose,
    "a layer used twice": Twice,
    "tied weights": Tied,
    "a frozen weight": lambda: frozen("first.weight"),
    "a frozen bias": lambda: frozen("last.bias"),
    "a frozen layer": lambda: frozen("first.weight", "first.bias"),
    "a weight used elsewhere": Elsewhere,
    "a weight used only elsewhere": OnlyElsewhere,
    "a weight used a little elsewhere": ALittleElsewhere,
    "a layer called by keyword": ByKeyword,
    "a lock": Locked,
    "an activation kept": Keeping,
    "a layer unused": Unused,
    "a layer in vain": InVain,
    "an output overwritten": Overwritten,
    "weight norm": lambda: Scaled(parametrizations.weight_norm),
    "spectral norm": lambda: Scaled(parametrizations.spectral_norm),
    "a weight halved": lambda: Scaled(halved),
    "a weight halved, no bias": lambda: Scaled(halved, bias=False),
    "circular": lambda: padded("circular"),
    "reflecting": lambda: padded("reflect"),
    "replicating": lambda: padded("replicate"),
    "no layers": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(144)),
}


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(9, 9, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.pairs(images[:, 0, 0].contiguous(), images[:, 1, 0].contiguous())


@pytest.mark.parametrize("kind", SUPPORTED)
def test_supported_models(kind: str) -> None:
    assert matches_autograd(made(kind), SMALL)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models(kind: str) -> None:
    torch.manual_seed(3)
    model = UNSUPPORTED[kind]()
    assert model(drawn(2)[0]).shape[0] == 2  # it works; only not so
    assert not matches_autograd(model, SMALL)


@pytest.mark.parametrize("kind", ["a weight used elsewhere", "circular", "an output overwritten"])
def test_a_last_layer_of_zeros_hides_nothing(kind: str) -> None:
    """No gradient passes through it, and all-zero gradients would agree."""
    torch.manual_seed(3)
    model = UNSUPPORTED[kind]()
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    for p in last.parameters():
        nn.init.zeros_(p)
    assert not matches_autograd(model, SMALL)


@pytest.mark.parametrize("kind", ["a loose parameter", "tied weights", "a frozen weight", "layer norm"])
def test_parameters_outside_the_layers_are_noticed(kind: str) -> None:
    assert not HookedLayers(UNSUPPORTED[kind]()).hold_all_parameters()
    assert HookedLayers(made("conv")).hold_all_parameters()


def test_padding_by_name_is_right_if_supported() -> None:
    """`_write_convolution` expects numbers; if this is ever supported, the gradient must be right."""
    model = convolved(5 * 8 * 9, nn.Conv2d(2, 5, 3, padding="same"), nn.ReLU())
    if matches_autograd(model, SMALL):
        images, labels = drawn(6)
        got = rows_of(model, HookedLayers(model), images, labels, (3, 3))
        torch.testing.assert_close(got.double(), by_autograd(model, images, labels, (3, 3)))


@pytest.mark.parametrize("name", MODELS)
def test_the_programs_own_models_are_supported(name: str) -> None:
    """This includes `cnn-small`, whose last layer starts at zero and hides the layers before it."""
    model = place(build(name, 10, seed=0), torch.device("cpu"))
    before = [p.clone() for p in model.parameters()]
    assert matches_autograd(model, MNIST_SHAPE)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---- Whether it is the same to the bit -------------------------------------------------------------------

COMPANY = [(16,) * 8, (32,) * 8, (64,) * 4, (100,) * 5, (16, 17, 16, 16), (12, 13, 13), (5,) * 6, (25,) * 2]
ROUNDS = 2


def differing(
    model: nn.Module, forward_pass: Callable[[nn.Module, Tensor], Tensor], shape: Sequence[int],
    classes: int, sizes: Sequence[int], rounds: int,
) -> list[int]:  # fmt: skip
    """Return the rounds, each with other images, in which a shard's bits differ alone and together."""
    layers, found = HookedLayers(model), []
    for seed in range(1, rounds + 1):
        images, labels = drawn(sum(sizes), shape, classes, seed)
        together = rows_of(model, layers, images, labels, sizes, forward_pass)
        parts = zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True)
        alone = [rows_of(model, layers, x.clone(), y, [len(y)], forward_pass) for x, y in parts]
        if not torch.equal(torch.cat(alone), together):
            found.append(seed)
    return found


def curved(activation: type[nn.Module]) -> nn.Module:
    """A user's own model: torch computes the last few numbers of these activations in another way."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 33), activation(), nn.Linear(33, 10))


CURVES = {each.__name__: each for each in (nn.GELU, nn.Sigmoid, nn.SiLU, nn.Tanh)}
SLOW = ("cnn", "cnn-large")
IN_COMPANY = [
    pytest.param(name, sizes, marks=pytest.mark.soak if name in SLOW and sum(sizes) > 128 else ())
    for name in (*MODELS, *CURVES)
    for sizes in COMPANY
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "sizes"), IN_COMPANY, ids=str)
def test_what_is_said_to_be_batch_invariant_is(
    name: str, precision: Precision, sizes: tuple[int, ...]
) -> None:
    """The images are other ones than the test used; if the answer is no, nothing is promised."""
    torch.manual_seed(1)
    model = curved(CURVES[name]) if name in CURVES else build(name, 10, seed=0)
    model = place(model, torch.device("cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    forward_pass = partial(forward, precision=precision)
    if is_batch_invariant(model, forward_pass, MNIST_SHAPE, sizes):
        rounds = 1 if name in SLOW else ROUNDS
        assert not differing(model, forward_pass, MNIST_SHAPE, 10, sizes, rounds)


def test_the_fast_recipes_shards_go_together() -> None:
    """This makes it fast. If no shards went together, the test above would test nothing."""
    model = place(build("cnn-small", 10, seed=0), torch.device("cpu"))
    assert is_batch_invariant(model, partial(forward, precision="bf16"), MNIST_SHAPE, [64] * 8)


class Company(Head):
    """Rounds differently in a larger batch: subtracts the batch's mean and adds it again."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        mean = pixels.mean(0)
        return super().forward((pixels - mean + mean).unflatten(1, (2, 72)))


class Crowd(Head):
    """Gives slightly larger logits for many images, as if another kernel were chosen."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * (1 + 2**-20 * (len(images) > 16)))


class Backwards(Head):
    """Gives the same logits in any batch, but another gradient."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if len(images) > 16:
            logits.register_hook(lambda gradient: gradient * (1 + 2**-20))
        return logits


class RowsFirst(nn.Module):
    """Its layer's input has the samples in the second dimension, so shards cannot be separated."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Linear(18, 5), nn.Linear(40, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.rows(images.transpose(1, 2).flatten(2).transpose(0, 1).contiguous())
        return self.last(hidden.transpose(0, 1).flatten(1).relu())


@pytest.mark.parametrize("kind", [Company, Crowd, Backwards, RowsFirst])
@pytest.mark.parametrize("sizes", [(16, 16), (9, 10), (6, 6, 6)])
def test_a_batch_that_changes_the_last_bits_is_noticed(
    kind: Callable[[], nn.Module], sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    model = kind()
    assert matches_autograd(model, SMALL)
    images, _ = drawn(sum(sizes))
    in_company, alone = model(images), torch.cat([model(x) for x in images.split(list(sizes))])
    assert torch.allclose(in_company, alone, rtol=1e-4, atol=1e-5)
    assert differing(model, plain, SMALL, 4, sizes, 2) == [1, 2]
    assert not is_batch_invariant(model, plain, SMALL, sizes)


class Reordered(nn.Linear):
    """Adds in another order in a larger batch, as another kernel may, and rounds to bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x, weight = input.bfloat16().float(), self.weight.bfloat16().float()
            if len(x) > 16:
                half = x.shape[1] // 2
                total = F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:])
            else:
                total = F.linear(x, weight)
            return (total + self.bias).bfloat16()


def test_an_order_that_rounding_hides_is_noticed() -> None:
    """In bfloat16 other sums nearly always round to the same: one test on ordinary numbers says nothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), Reordered(144, 4))
    bf16 = partial(forward, precision="bf16")
    assert not differing(model, bf16, SMALL, 4, (16, 16), 5)
    assert not is_batch_invariant(model, bf16, SMALL, (16, 16))
    assert is_batch_invariant(model, bf16, SMALL, (8, 8))


@pytest.mark.parametrize("kind", [Company, Crowd, Backwards])
def test_one_shard_alone_is_batch_invariant(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    assert is_batch_invariant(kind(), plain, SMALL, [16])


class Noisy(nn.Module):
    """A small network that draws in training as `draw` does."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self._draw = nn.Linear(144, 16), nn.Linear(16, 4), draw

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self._draw(self.first(images.flatten(1)).relu()))


def reseeded(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return F.dropout(x, 0.5)


def recomputed(x: Tensor) -> Tensor:
    """Draws again in the backward pass, from the global generator."""
    return checkpoint(partial(F.dropout, p=0.5), x * 1, use_reentrant=False)


@pytest.mark.parametrize(
    ("draw", "shared"),
    [
        (partial(F.dropout, p=0.5), True),
        (lambda x: x * torch.rand_like(x[:, :1]), True),
        (lambda x: x * torch.rand(1), False),
        (lambda x: x * torch.rand(len(x), 1), False),
        (lambda x: F.dropout(x.t().contiguous(), 0.5).t(), False),  # its rows are no samples
        (reseeded, False),
        (recomputed, False),
    ],
)
def test_models_that_draw_share_a_pass_if_each_shard_draws_the_same_as_alone(
    draw: Callable[[Tensor], Tensor], shared: bool
) -> None:
    assert is_batch_invariant(Noisy(draw), plain, SMALL, [8, 8]) == shared


def test_trying_leaves_the_model_alone() -> None:
    model = made("conv")
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    is_batch_invariant(model, plain, SMALL, [4, 4])
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# ---- What is kept ----------------------------------------------------------------------------------------


class Outputs:
    """Weak references to the outputs of a model's layers."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen += [weakref.ref(output)]

    def alive(self) -> int:
        gc.collect()
        return sum(each() is not None for each in self.seen)


def test_outside_of_a_recorded_pass_nothing_is_kept() -> None:
    """A hook that recorded every pass would keep an evaluation's activations forever."""
    model = made("conv, channels last")
    layers, outputs = HookedLayers(model), Outputs(model)
    images, labels = drawn(6)
    model(images)
    assert len(outputs.seen) == 3
    assert outputs.alive() == 0
    rows_of(model, layers, images, labels, (3, 3))
    assert len(outputs.seen) == 6
    assert outputs.alive() == 0
    with torch.no_grad():
        model(images)
    assert outputs.alive() == 0


def test_a_recorded_pass_keeps_what_it_needs() -> None:
    """Otherwise the test above could not fail."""
    model = made("conv, channels last")
    layers, outputs = HookedLayers(model), Outputs(model)
    with layers.recording():
        logits = model(drawn(6)[0])
        del logits
    assert outputs.alive() == 3


class ByImage(Head):
    """Does something else for bright images. Subclasses say what."""

    def forward(self, images: Tensor) -> Tensor:
        return self.bright(images) if float(images.max()) > 9 else super().forward(images)

    def bright(self, images: Tensor) -> Tensor:
        return super().forward(images)


class UsesAWeight(ByImage):
    def bright(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        return super().bright(images) + F.linear(self.first(pixels), self.last.weight)


class LeavesALayerOut(ByImage):
    def bright(self, images: Tensor) -> Tensor:
        return F.pad(images.flatten(1)[:, :1], (0, 3)) + self.last.bias


class CallsALayerAgain(ByImage):
    def bright(self, images: Tensor) -> Tensor:
        return super().bright(images) + self.last(self.first(images.flatten(1)))


class ChangesAnOutput(ByImage):
    def bright(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)).sigmoid_())


class IgnoresAnOutput(ByImage):
    def bright(self, images: Tensor) -> Tensor:
        self.first(images.flatten(1))
        return self.last(images.flatten(1)[:, :6])


class RoutesImages(ByImage):
    """Sends the bright images, here three of six, through a layer."""

    def bright(self, images: Tensor) -> Tensor:
        chosen, hidden = images.amax((1, 2, 3)) > 9, images.flatten(1)[:, :6]
        found = self.first(images[chosen].flatten(1)).to(hidden)
        return self.last(hidden.index_add(0, chosen.nonzero()[:, 0], found))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind",
    [UsesAWeight, LeavesALayerOut, CallsALayerAgain, ChangesAnOutput, IgnoresAnOutput, RoutesImages],
)
def test_what_depends_on_the_images_has_autograds_gradient(kind: type[ByImage], autocast: bool) -> None:
    """The trial on noise sees nothing of it, and a layer of a wrong gradient has no other sign."""
    torch.manual_seed(3)
    model = kind()
    assert matches_autograd(model, SMALL)
    layers = HookedLayers(model)
    images, outer = drawn(6)[0], torch.randn(6, 4)
    images[[1, 2, 5]] *= 100

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        rows = slice(shards.start * 3, shards.stop * 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(images[rows]).float(), outer[rows]

    compute_gradients(TreeGradients(model, WORLD, 2, layers, [(3, 3)]), forward_shards, [3, 3])
    tree = [cast("Tensor", p.grad).clone() for p in model.parameters()]
    by_shard = [forward_shards(model, range(i, i + 1)) for i in range(2)]
    total = sum((logits * grad).sum() for logits, grad in by_shard)
    expected = torch.autograd.grad(cast("Tensor", total), list(model.parameters()), allow_unused=True)
    for got, right in zip(tree, expected, strict=True):
        scale = 0.02 if autocast else 1e-5
        if right is None:
            assert not got.any()
        else:
            assert float((got - right).abs().max()) <= scale * float(right.abs().max())
