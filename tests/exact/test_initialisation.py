"""Test initial weights: distributions, torch's own initialisers, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_mnist.common.digest import digest
from distributed_mnist.common.generators import seed_generators
from distributed_mnist.config import Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.exact.initial_values import normal, qr, uniform
from distributed_mnist.exact.initialisation import ExactInitialisation, InexactOperation
from distributed_mnist.models.build import build, make_model
from distributed_mnist.user_code.functions import registered

CASES = pytest.mark.parametrize


def made(factory: Callable[[], Any], seed: int = 0) -> Any:
    seed_generators("init", seed)
    with ExactInitialisation():
        return factory()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_uniform_and_normal_values() -> None:
    flat = uniform((300, 100), "key")
    assert 0 <= flat.min() < 1e-3
    assert 1 - 1e-3 < flat.max() < 1
    values = normal((99_999,), "key")
    moments = [float((values**k).mean()) for k in range(1, 5)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)  # five deviations
    halves = values[:49_999], values[50_000:]  # from the same two uniform numbers
    assert abs(float(torch.corrcoef(torch.stack(halves))[0, 1])) < 0.02
    beyond = [float((values.abs() > bound).double().mean()) for bound in (1, 2, 3)]
    assert beyond == pytest.approx([0.3173, 0.0455, 0.0027], abs=0.005)
    assert torch.equal(normal((3, 4), "key"), normal((3, 4), "key"))
    assert normal((), "key").shape == uniform((), "key").shape == ()
    assert not torch.equal(normal((3, 4), "key"), normal((3, 4), "other"))


@CASES(("rows", "columns"), [(5, 5), (40, 70), (70, 40), (1, 9), (9, 1)])
def test_qr(rows: int, columns: int) -> None:
    matrix = normal((rows, columns), "matrix")
    q, r = qr(matrix)
    count = min(rows, columns)
    assert (q.shape, r.shape) == ((rows, count), (count, columns))
    torch.testing.assert_close(q @ r, matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.t() @ q, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(r, r.triu())
    assert (r.diagonal() > 0).all()


def test_qr_needs_full_rank() -> None:
    with pytest.raises(ValueError, match="full rank"):
        qr(torch.zeros(3, 3, dtype=torch.float64))


@CASES("shape", [(16, 8, 3, 3), (10, 7)])
def test_orthogonal_weights_are_torchs_for_the_same_normal_matrix(shape: tuple[int, ...]) -> None:
    weight = made(lambda: nn.init.orthogonal_(torch.empty(shape), 2.0)).flatten(1).double()
    matrix = made(lambda: torch.empty(shape[0], math.prod(shape[1:])).normal_()).double()
    tall = matrix if len(matrix) > matrix.shape[1] else matrix.t()
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    torch.testing.assert_close(weight, 2 * (q if tall is matrix else q.t()), rtol=0, atol=1e-6)


INITIALISERS: list[Callable[[Tensor], Any]] = [
    nn.init.uniform_,
    nn.init.xavier_uniform_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.xavier_normal_,
    nn.init.kaiming_normal_,
    nn.init.orthogonal_,
    nn.init.trunc_normal_,
    lambda weight: nn.init.sparse_(weight, 0.25),
]


@CASES("initialise", INITIALISERS)
def test_torchs_initialisers_have_their_distributions(initialise: Callable[[Tensor], Any]) -> None:
    """The mean and deviation are torch's; equal seeds give equal values, others others."""
    weight = made(lambda: initialise(torch.empty(60, 80)))
    torch.manual_seed(0)
    expected = initialise(torch.empty(60, 80))
    deviation = float(expected.std())
    assert float(weight.std()) == pytest.approx(deviation, rel=0.06)
    assert abs(float(weight.mean() - expected.mean())) < 0.1 * deviation
    assert float(weight.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.4)
    assert torch.equal(made(lambda: initialise(torch.empty(60, 80))), weight)
    assert not torch.equal(made(lambda: initialise(torch.empty(60, 80)), seed=1), weight)


def test_other_draws() -> None:
    def draw() -> tuple[Tensor, ...]:
        return (
            torch.randint(3, 9, (500,)),
            torch.randperm(100),
            torch.rand_like(torch.ones(4, 5)),
            torch.randn(2000, dtype=torch.float64) * 2 + 1,
            torch.empty(1000).bernoulli_(0.25),
            torch.normal(torch.full((3,), 50.0), 1.0),
            torch.empty(50, dtype=torch.int64).random_(10),
        )

    integers, order, like, normals, chosen, around, digits = drawn = made(draw)
    assert sorted(integers.unique().tolist()) == list(range(3, 9))
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))
    assert like.shape == (4, 5)
    assert float(normals.std()) == pytest.approx(2, rel=0.1)
    assert float(chosen.mean()) == pytest.approx(0.25, abs=0.06)
    assert (around > 40).all()
    assert digits.min() >= 0
    assert digits.max() < 10
    assert all(map(torch.equal, made(draw), drawn))


def test_a_generator_of_ones_own_counts_for_itself() -> None:
    def draw() -> tuple[Tensor, ...]:
        first, second = (torch.Generator().manual_seed(7) for _ in range(2))
        results = [torch.randn(4, generator=first), torch.randn(4, generator=first)]
        return (*results, torch.randn(4, generator=second))

    first, second, again = made(draw)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(made(draw, seed=1)[0], first)


def test_a_table_of_positions() -> None:
    """Sines and cosines, as in a transformer's positional encoding, and their like are computed."""

    def table() -> Tensor:
        positions = torch.arange(50).unsqueeze(1)
        rates = torch.exp(torch.arange(0, 16, 2) * -0.5756)
        return torch.cat([torch.sin(positions * rates), torch.cos(positions * rates).sqrt_()], 1).tanh()

    assert torch.allclose(made(table), table(), atol=1e-5, equal_nan=True)
    assert torch.allclose(made(lambda: torch.linspace(0, 0.1, 7)), torch.linspace(0, 0.1, 7))


def test_equal_values_stay_in_order_when_sorted() -> None:
    values = (torch.arange(1000) % 3).float()
    assert torch.equal(made(values.argsort), values.argsort(stable=True))


REFUSED: dict[str, Callable[[], Any]] = {
    "mm": lambda: torch.rand(2, 2) @ torch.rand(2, 2),
    "sum": lambda: torch.rand(5).sum(),
    "mean": lambda: torch.rand(5).mean(),
    "atan": lambda: torch.rand(5).atan_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((5,), 0.9)),
    "pow": lambda: torch.rand(5) ** 0.5,
    "add": lambda: torch.add(torch.rand(5), torch.rand(5), alpha=3),
    "addcmul": lambda: torch.addcmul(torch.rand(5), torch.rand(5), torch.rand(5)),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 1),
    "exponential": lambda: torch.empty(5).exponential_(),
    "linalg_svd": lambda: torch.linalg.svdvals(torch.rand(3, 3)),
    "_linalg_svd": lambda: torch.linalg.svd(torch.rand(3, 3)),
    "arange": lambda: torch.arange(0, 1, 0.1),
    "mul": lambda: torch.ones(3, dtype=torch.complex64) * 1j,
}


@CASES("name", REFUSED)
def test_what_may_differ_between_machines_is_refused(name: str) -> None:
    with pytest.raises(InexactOperation, match=name):
        made(REFUSED[name])


def test_bounds_that_normal_values_hardly_meet() -> None:
    with pytest.raises(InexactOperation, match=r"trunc_normal_ with bounds from 9 to 10"):
        made(lambda: nn.init.trunc_normal_(torch.empty(3), 0, 1, 9, 10))


def test_torchs_functions_are_put_back() -> None:
    function = nn.init._no_grad_trunc_normal_
    made(lambda: nn.init.trunc_normal_(torch.empty(3)))
    assert nn.init._no_grad_trunc_normal_ is function


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
    lambda: nn.Embedding(10, 4, padding_idx=0),
    lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(3)),
    lambda: nn.LSTM(4, 5),
]


@CASES("layer", LAYERS)
def test_torchs_layers(layer: Callable[[], nn.Module]) -> None:
    first = weights(made(layer))
    assert first.isfinite().all()
    assert torch.equal(first, weights(made(layer)))


KNOWN = {
    "linear": "5d8e57f44654354f",
    "mlp": "35e565dba9054308",
    "cnn": "13914e89117d9e39",
    "cnn-small": "bbe46def1743ca00",
    "cnn-large": "c297131f38e74551",
}


@CASES("name", KNOWN)
def test_the_networks_weights_are_the_same_on_every_machine(name: str) -> None:
    model = build(name, 10, seed=0, exact=True)
    assert digest(model.state_dict())[:16] == KNOWN[name]


def test_the_recipe_decides() -> None:
    recipe = Recipe(model="linear")
    models = [
        make_model(recipe.replace(precision=precision), 10, torch.device("cpu"))[0]
        for precision in ("exact", "fp32")
    ]
    expected = [build("linear", 10, 0, exact=exact) for exact in (True, False)]
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(models, expected, strict=True))
    assert not torch.equal(weights(models[0]), weights(models[1]))


def test_a_lazy_layer() -> None:
    def lazy(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    with registered({"mine:lazy": lazy}):
        first, second = (weights(build("mine:lazy", 10, 0, exact=True)) for _ in range(2))
    eager = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    assert torch.equal(first, second)
    assert float(first.std()) == pytest.approx(float(weights(eager).std()), rel=0.05)


def test_a_factory_is_refused_in_one_line() -> None:
    def unfit(classes: int) -> nn.Module:
        layer = nn.Linear(784, classes)
        layer.weight.data /= layer.weight.data.norm()
        return nn.Sequential(nn.Flatten(), layer)

    with registered({"mine:unfit": unfit}), pytest.raises(UsageError) as caught:
        build("mine:unfit", 10, 0, exact=True)
    assert str(caught.value).startswith("--model mine:unfit: its factory uses ")
    assert "norm" in str(caught.value)
    assert "\n" not in str(caught.value)
