"""Test elementary functions against numbers of 50 decimal digits, and pin some bits for every machine."""

import hashlib
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_mnist.common.random_keys import random_bits, uniform
from distributed_mnist.exact.elementary import (
    LARGEST_ANGLE,
    erf,
    exp,
    log,
    sigmoid,
    sin_and_cos,
    sqrt,
    tanh,
)
from distributed_mnist.exact.loss import cross_entropy
from distributed_mnist.exact.ordered_sums import softmax, sum_over
from distributed_mnist.exact.resampling import resample

DIGITS = 50
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def drawn(low: float, high: float, count: int = 400) -> Tensor:
    """Return numbers between two bounds, the same on every machine."""
    fractions = torch.from_numpy(uniform(random_bits(count, "elementary", str(low), str(high))))
    return fractions * (high - low) + low


def sine_and_cosine(x: float) -> tuple[Decimal, Decimal]:
    """Sum the Taylor series, for the angle less whole turns."""
    angle = Decimal(x)
    angle -= 2 * PI * (angle / (2 * PI)).to_integral_value()
    term, sums = Decimal(1), [Decimal(0), Decimal(0)]
    for k in range(60):
        sums[k % 2] += term if k % 4 < 2 else -term
        term *= angle / (k + 1)
    return sums[1], sums[0]


def worst(got: Tensor, arguments: Tensor, reference: Callable[[float], Decimal], relative: bool) -> float:
    """Return the largest error, in ulp of the right result or absolute."""
    with localcontext(prec=DIGITS):
        errors = []
        for value, x in zip(got.tolist(), arguments.tolist(), strict=True):
            right = reference(x)
            unit = Fraction(math.ulp(float(right))) if relative else Fraction(1)
            errors.append(abs(Fraction(value) - Fraction(right)) / unit)
        return float(max(errors))


@pytest.mark.parametrize(("low", "high"), [(-1e-3, 1e-3), (-1.0, 1.0), (-40.0, 0.0), (-708.0, 709.7)])
def test_exp(low: float, high: float) -> None:
    x = drawn(low, high)
    assert worst(exp(x), x, lambda value: Decimal(value).exp(), relative=True) <= 1.2


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.5, 2.0), (0.999, 1.001), (1.0, 1e300), (1e-300, 1e-299)]
)
def test_log(low: float, high: float) -> None:
    x = drawn(low, high)
    assert worst(log(x), x, lambda value: Decimal(value).ln(), relative=True) <= 1.0


@pytest.mark.parametrize("bound", [0.8, 7.0, 1e3, LARGEST_ANGLE])
def test_sine_and_cosine(bound: float) -> None:
    x = drawn(-bound, bound, 200)
    for part, got in enumerate(sin_and_cos(x)):
        assert (
            worst(got, x, lambda value, part=part: sine_and_cosine(value)[part], relative=False) <= 1.6e-16
        )


def sum_of_erf(x: float) -> Decimal:
    """Sum a series whose terms have one sign: 2 / sqrt(pi) * exp(-x^2) * sum of 2^k x^(2k+1) / (2k+1)!!."""
    value = Decimal(x)
    term = total = value
    for k in range(1, 150):
        term *= 2 * value * value / (2 * k + 1)
        total += term
    return 2 / PI.sqrt() * (-value * value).exp() * total


def test_sigmoid_tanh_and_erf() -> None:
    x = torch.cat([drawn(-7.0, 7.0, 200), drawn(-0.01, 0.01, 20)])
    assert worst(sigmoid(x), x, lambda value: 1 / (1 + (-Decimal(value)).exp()), relative=True) <= 2
    right = worst(tanh(x), x, lambda value: 1 - 2 / ((2 * Decimal(value)).exp() + 1), relative=False)
    assert right <= 4e-16
    assert worst(erf(x), x, sum_of_erf, relative=False) <= 5e-16
    far = torch.tensor([math.inf, -math.inf, 800, -800, math.nan], dtype=torch.float64)
    for function, low in ((sigmoid, 0), (tanh, -1), (erf, -1)):
        assert function(far)[:4].tolist() == [1, low, 1, low]
        assert function(far)[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_root_is_correctly_rounded(dtype: torch.dtype) -> None:
    """Compare squares: the right result is within half an ulp. `torch.sqrt` often fails this."""
    x = drawn(1e-3, 4.0, 3000).to(dtype)
    roots = sqrt(x)
    ulp = np.spacing(roots.numpy()).tolist()
    for value, root, unit in zip(x.tolist(), roots.tolist(), ulp, strict=True):
        half = Fraction(unit) / 2
        assert (Fraction(root) - half) ** 2 <= Fraction(value) <= (Fraction(root) + half) ** 2
    assert sqrt(x, out=x) is x
    assert torch.equal(x, roots)
    edges = torch.tensor([0.0, math.inf, -1.0, math.nan, 2.0], dtype=dtype)
    assert sqrt(edges)[:2].tolist() == [0, math.inf]
    assert sqrt(edges)[2:4].isnan().all()
    assert sqrt(edges[0]).shape == ()


def test_edges() -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([0.0, inf, -inf, 1e308, -1e308, 709.79, 709.7, -708.06, -708.0], dtype=torch.float64)
    e = exp(x)
    assert e[:6].tolist() == [1, inf, 0, inf, 0, inf]
    assert e[6].isfinite()
    assert e[7] == 0
    assert e[8] >= 2.0**-1022
    positive = torch.tensor([0.0, -0.0, 5e-324, inf, 1.0], dtype=torch.float64)
    assert log(positive).tolist() == [-inf, -inf, -inf, inf, 0]
    for function in (exp, log):
        assert function(torch.tensor([nan], dtype=torch.float64)).isnan().all()
    assert log(torch.tensor([-1.0, -inf], dtype=torch.float64)).isnan().all()
    outside = torch.tensor([nan, inf, -inf, 2**20 + 1], dtype=torch.float64)
    assert all(part.isnan().all() for part in sin_and_cos(outside))
    sine, cosine = sin_and_cos(torch.zeros(1, dtype=torch.float64))
    assert (sine.item(), cosine.item()) == (0, 1)


def test_an_element_depends_on_no_other_and_not_on_strides() -> None:
    x = drawn(0.1, 5.0, 90).view(9, 10)
    before = x.clone()
    functions = (exp, log, sigmoid, tanh, erf, lambda t: sin_and_cos(t)[0], lambda t: sin_and_cos(t)[1])
    for function in functions:
        whole = function(x)
        assert torch.equal(function(x.t()), whole.t())
        assert torch.equal(function(x[3:4, 5]), whole[3:4, 5])
        assert torch.equal(function(x[2, 2]), whole[2, 2])
        assert function(x[:0]).shape == (0, 10)
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [exp, erf])
def test_large_tensors_are_computed_in_blocks(function: Callable[[Tensor], Tensor]) -> None:
    x = drawn(0.1, 3.0, 1000).repeat(200).view(400, 500)
    whole = function(x)
    assert torch.equal(whole.view(200, 1000), function(x.view(-1)[:1000]).expand(200, -1))
    assert torch.equal(function(x.t()), whole.t())


def test_the_bits_are_the_same_on_every_machine() -> None:
    """These bits were computed once; a machine, or a version of torch, with others breaks the promise."""
    x = drawn(0.01, 30.0, 1000)
    results = (exp(x), exp(-x), log(x), *sin_and_cos(x), sigmoid(x - 15), tanh(x - 15), erf(x / 5 - 3))
    found = hashlib.sha256(torch.cat(results).numpy().astype("<f8").tobytes()).hexdigest()
    assert found == "a43f55f098769f5aebab59bbaa812b32f9cec9b4e8bd9f816c242d14699a6970"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator here")
def test_an_accelerator_gives_the_processors_bits() -> None:
    x = drawn(-8.0, 8.0, 100_000)
    functions = (exp, lambda t: log(t.abs()), sigmoid, tanh, erf, lambda t: sqrt(t.abs()))
    more = (lambda t: sin_and_cos(t)[0], lambda t: softmax(t.view(-1, 10), 1), lambda t: sum_over(t, 0))
    device = torch.accelerator.current_accelerator()
    for function in (*functions, *more):
        assert torch.equal(function(x.to(device)).cpu(), function(x))
    single = x.float().abs()
    assert torch.equal(sqrt(single.to(device)).cpu(), sqrt(single))
    labels = torch.arange(10_000) % 10
    for there, here in zip(
        cross_entropy(x.float().view(-1, 10).to(device), labels.to(device), 0.1),
        cross_entropy(x.float().view(-1, 10), labels, 0.1),
        strict=True,
    ):
        assert torch.equal(there.cpu(), here)
    transforms = (drawn(-1.0, 1.0, 60) * 0.3).float().view(10, 2, 3) + torch.eye(2, 3)
    images = x[:78_400].float().view(10, 10, 28, 28)
    assert torch.equal(
        resample(images.to(device), transforms.to(device)).cpu(), resample(images, transforms)
    )
