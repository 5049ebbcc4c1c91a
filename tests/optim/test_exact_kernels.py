"""Test that the exact kernels are single operations: bit for bit NumPy's, on any kind of processor."""

import copy
import io
import os
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError, UsageError
from distributed_mnist.optim import exact_muon, fused, newton_schulz, weight_average
from distributed_mnist.optim.clipping import clip_gradients
from distributed_mnist.optim.optimizers import Optimizer
from distributed_mnist.optim.schedule import make_optimizer
from distributed_mnist.optim.single_operations import power
from distributed_mnist.runs.optimizer_state import load_optimizer

Array = NDArray[Any]
f32 = np.float32
STEPS = 12
LR, BETA1, BETA2, MOMENTUM = 0.02, 0.9, 0.99, 0.8
EXACT = Recipe(precision="exact", lr=LR, beta1=BETA1, beta2=BETA2, momentum=MOMENTUM)
OPTIMIZERS = ["adam", "adamw", "sgd", "muon"]


def network(seed: int = 0) -> nn.Sequential:
    noise = np.random.default_rng(seed)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 8, 1), nn.Flatten(), nn.Linear(7, 211))
    for p in model.parameters():
        p.data.copy_(torch.from_numpy(noise.integers(-9999, 10000, p.shape) / f32(30000)))
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    """Give gradients of magnitudes from 1e-20 to 10, the same on every machine."""
    noise = np.random.default_rng(seed)
    for p in model.parameters():
        exponents = noise.integers(noise.integers(-65, 3), 4, p.shape)
        values = np.ldexp(noise.integers(-9999, 10000, p.shape) / 10000, exponents)
        p.grad = torch.empty_like(p).copy_(torch.from_numpy(values))


def trained(model: nn.Module, recipe: Recipe) -> list[Tensor]:
    """Return the weights after a few steps with clipping and an average."""
    optimizer = make_optimizer(recipe, model)
    for step in range(3):
        give_gradients(model, step)
        clip_gradients(model.parameters(), 5.0, exact=True)
        optimizer.step()
        weight_average.update_moving_average(optimizer, 0.9, step)
    averages = [optimizer.state[p]["weights_ema"] for p in model.parameters()]
    return [*(p.detach().contiguous() for p in model.parameters()), *(a.contiguous() for a in averages)]


def digest_of_steps() -> str:
    return digest([trained(network(), EXACT.replace(optimizer=name)) for name in OPTIMIZERS])


def numpy_step(name: str, decay: float, w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    """Return a parameter's new value, computed in NumPy's float32."""
    if decay and name == "adamw":
        w = w * f32(1 - LR * decay)
    elif decay:
        g = w * f32(decay) + g
    if name == "sgd":
        state["b"] = state["b"] * f32(MOMENTUM) + g if step else g
        return w - (state["b"] * f32(MOMENTUM) + g) * f32(LR)
    state["m"] = state.get("m", f32(0)) * f32(BETA1) + g * f32(1 - BETA1)
    state["v"] = state.get("v", f32(0)) * f32(BETA2) + g * g * f32(1 - BETA2)
    # Powers in fractions. Beyond a few steps they differ from repeated multiplication, in a last bit of
    # float64 that float32 rarely sees; here it does not.
    correction = [float(1 - Fraction(beta) ** (step + 1)) for beta in (BETA1, BETA2)]
    root = np.sqrt(correction[1])
    divisor = np.sqrt(state["v"]) + f32(1e-8 * root)
    return w - state["m"] / divisor * f32(LR * root / correction[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_steps_are_those_of_numpy(name: str, decay: float) -> None:
    model = network()
    optimizer = make_optimizer(EXACT.replace(optimizer=name, weight_decay=decay), model)
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    states: list[dict[str, Array]] = [{} for _ in expected]
    for step in range(STEPS):
        give_gradients(model, step)
        gradients = [p.grad.numpy() for p in model.parameters() if p.grad is not None]
        expected = [
            numpy_step(name, decay, w, g, state, step)
            for w, g, state in zip(expected, gradients, states, strict=True)
        ]
        optimizer.step()
        for p, w in zip(model.parameters(), expected, strict=True):
            assert np.array_equal(p.detach().numpy(), w)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_fused_kernels_to_rounding(name: str, decay: float) -> None:
    """Also those of an exact run that starts from a checkpoint in fp32."""
    model = network()
    recipe = EXACT.replace(optimizer=name, weight_decay=decay)
    fused = make_optimizer(recipe.replace(precision="fp32"), model)
    for step in range(4):
        give_gradients(model, step)
        fused.step()
    twin = copy.deepcopy(model)
    exact = make_optimizer(recipe, twin)
    load_optimizer(exact, copy.deepcopy(fused.state_dict()), "here", steps=4)
    for step in range(4, STEPS):
        for each, optimizer in ((model, fused), (twin, exact)):
            give_gradients(each, step)
            optimizer.step()
    assert not all(map(torch.equal, model.parameters(), twin.parameters()))
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    saved, other = exact.state_dict()["state"], fused.state_dict()["state"]
    assert {key: value.keys() for key, value in saved.items()} == {
        key: value.keys() for key, value in other.items()
    }


@pytest.mark.parametrize("recipe", [EXACT, EXACT.replace(precision="fp32")], ids=["exact", "fp32"])
def test_parameters_that_took_different_numbers_of_steps_are_refused(recipe: Recipe) -> None:
    """One correction of the bias is for all of them."""
    model = network()
    optimizer = make_optimizer(recipe, model)
    give_gradients(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    load_optimizer(optimizer, saved, "here", steps=1)
    saved["state"][1]["step"] += 1
    with pytest.raises(CheckpointError, match="have taken different numbers of steps"):
        load_optimizer(optimizer, saved, "here", steps=1)


def test_the_kernels_may_be_imported_where_another_device_is_the_default() -> None:
    with torch.device("meta"):
        module = runpy.run_path(fused.__file__)
    assert module["_ONE"].device == torch.device("cpu")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_numbers_may_be_tensors(name: str, precision: str) -> None:
    """A captured step reads them from the device. `float64` here, as no kernel on a CPU needs less."""
    recipe = EXACT.replace(precision=precision, optimizer=name, weight_decay=0.1)
    weights: list[list[Tensor]] = []
    for as_tensors in (False, True):
        model = network()
        optimizer = make_optimizer(recipe, model)
        assert isinstance(optimizer, Optimizer)
        for step in range(3):
            give_gradients(model, step)
            numbers: Any = optimizer.next_numbers()
            if as_tensors:
                numbers = [[torch.tensor(number, dtype=torch.float64) for number in of] for of in numbers]
            optimizer.apply(numbers)
        weights.append([p.detach() for p in model.parameters()])
    if precision == "exact" or name != "muon":
        assert all(map(torch.equal, *weights))
    else:  # a rate that is a number is multiplied and added with one rounding
        assert all(map(torch.allclose, *weights))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    """The state in a checkpoint is that of each parameter, though in memory it is one vector."""
    recipe = EXACT.replace(optimizer=name, weight_decay=0.1)

    def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(model, step)
            optimizer.step()
            weight_average.update_moving_average(optimizer, 0.9, step)

    model, resumed = network(), network(1)
    optimizer, other = make_optimizer(recipe, model), make_optimizer(recipe, resumed)
    take(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    weights, saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    load_optimizer(other, saved, "here", steps=3)
    take(model, optimizer, range(3, 6))
    take(resumed, other, range(3, 6))
    assert digest(dict(model.state_dict())) == digest(dict(resumed.state_dict()))
    assert digest(optimizer.state_dict()["state"]) == digest(other.state_dict()["state"])


def test_clipping_and_averages_are_those_of_numpy() -> None:
    model = network()
    give_gradients(model, 0)
    gradients = [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
    squares = np.concatenate([g.ravel() for g in gradients]) ** 2
    while len(squares) > 1:
        half = (len(squares) + 1) // 2
        squares[: len(squares) - half] += squares[half:]
        squares = squares[:half]
    clip_gradients(model.parameters(), 0.5, exact=True)
    factor = f32(1) / (np.sqrt(squares[0]) + f32(1e-6)) * f32(0.5)
    assert factor < 1
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert np.array_equal(p.grad.numpy(), g * factor)

    optimizer = make_optimizer(EXACT, model)
    mean = [p.detach().numpy().copy() for p in model.parameters()]
    for count in range(5):
        weight_average.update(optimizer, count)
        mean = [
            m + (p.detach().numpy() - m) * f32(1 / (count + 1))
            for p, m in zip(model.parameters(), mean, strict=True)
        ]
        for p in model.parameters():
            p.data.mul_(1.3)
    weight_average.apply_mean(optimizer)
    for p, m in zip(model.parameters(), mean, strict=True):
        assert np.array_equal(p.detach().numpy(), m)


def test_the_same_bits_with_more_threads_and_other_layouts() -> None:
    expected = digest_of_steps()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads != 2 else 1)
        assert digest_of_steps() == expected
    finally:
        torch.set_num_threads(threads)
    for name in OPTIMIZERS:
        contiguous = network()
        other = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        last = other[-1]
        assert isinstance(last, nn.Linear)
        last.weight = nn.Parameter(last.weight.detach().t().contiguous().t())
        assert not any(p.is_contiguous() for p in (other[0].weight, last.weight))
        recipe = EXACT.replace(optimizer=name)
        assert digest(trained(other, recipe)) == digest(trained(contiguous, recipe))


def test_the_same_bits_without_vector_instructions() -> None:
    program = """
import torch, test_exact_kernels
print(test_exact_kernels.digest_of_steps(), torch.backends.cpu.get_cpu_capability())
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    variables = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.split() == [digest_of_steps(), "DEFAULT"]


def matrices() -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 150, generator=noise)
    outlier = normal.clone()
    outlier[3, 5] = 1e6
    return [
        normal,
        normal.t() * 1e-30,
        outlier,
        torch.ones(40, 41),  # one singular value
        torch.eye(30),  # all are equal
        normal * 10.0 ** torch.randint(-8, 8, normal.shape, generator=noise),
    ]


def norm_of(matrix: Tensor) -> Tensor:
    return exact_muon.frobenius_norms((matrix.double(),))[0]


def orthogonalise(matrix: Tensor) -> Tensor:
    return exact_muon.orthogonalise(matrix.double(), norm_of(matrix))


@pytest.mark.parametrize("matrix", matrices())
def test_no_sum_of_newton_schulz_rounds(matrix: Tensor) -> None:
    """If one did, its result would depend on the order of the rows and columns."""
    noise = torch.Generator().manual_seed(1)
    expected = orthogonalise(matrix)
    for _ in range(3):
        rows, columns = (torch.randperm(side, generator=noise) for side in matrix.shape)
        mixed = orthogonalise(matrix[rows][:, columns])
        assert torch.equal(mixed, expected[rows][:, columns])
    torch.testing.assert_close(expected.float(), newton_schulz.orthogonalise(matrix), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("matrix", matrices())
def test_norms_are_exact_sums(matrix: Tensor) -> None:
    norm = norm_of(matrix)
    square = sum(Fraction(value) ** 2 for value in matrix.flatten().tolist())
    assert abs(Fraction(norm.item()) ** 2 / square - 1) < 1e-6
    noise = torch.Generator().manual_seed(1)
    for _ in range(3):
        mixed = matrix.flatten()[torch.randperm(matrix.numel(), generator=noise)]
        assert torch.equal(norm_of(mixed), norm)


def test_a_tensor_too_large_for_an_exact_norm_is_refused() -> None:
    large = torch.zeros(1, dtype=torch.float64).expand(2**13, 2**12)
    with pytest.raises(ValueError, match="not of 33,554,432"):
        norm_of(large)


def test_ones_own_optimizer_is_refused() -> None:
    with pytest.raises(
        UsageError, match="--optimizer must be adam, adamw, sgd or muon with --precision exact"
    ):
        Recipe(precision="exact", optimizer="torch.optim:NAdam")


@pytest.mark.parametrize("exponent", [0, 1, 2, 13, 110, 10_000])
def test_powers(exponent: int) -> None:
    exact = Fraction(0.999) ** exponent
    assert abs(Fraction(power(0.999, exponent)) / exact - 1) < exponent * 2.0**-53 + 1e-300
