"""Test scales: which magnitudes decide them, and when."""

import math

import torch
from torch import Tensor, nn

from distributed_mnist.exact.fixed_point import HEADROOM, LIMIT, OPERAND_BITS, quantise
from distributed_mnist.exact.passes.training_pass import TrainingPass
from distributed_mnist.exact.scales import Scales, sample_exponents


def scales_with(*magnitudes: float) -> Scales:
    scales = Scales(torch.device("cpu"))
    scales.restore(torch.tensor(magnitudes))
    scales.begin_step()
    return scales


def exponents(scales: Scales) -> list[int]:
    return [int(k) for k in scales.exponents]


def integers(scales: Scales, index: int, *values: float) -> list[int]:
    return quantise(torch.tensor(values), scales.exponents[index]).tolist()


def test_a_scale_comes_from_the_step_before() -> None:
    scales = scales_with(1.0, 8.0)
    assert exponents(scales) == [12, 9]  # 1 < 2**1, 8 < 2**4, and 13 bits
    scales.observe(0, torch.tensor([0.5, -3.0]))
    scales.observe(0, torch.tensor([2.0]))  # another pass of the step
    scales.observe(1, torch.tensor([-0.25]))
    assert exponents(scales) == [12, 9]  # the present step is as it was
    scales.end_step()
    assert scales.before.tolist() == [3.0, 0.25]
    scales.begin_step()
    assert exponents(scales) == [11, 14]
    assert scales.now.tolist() == [0, 0]


def test_there_is_headroom_and_then_values_saturate() -> None:
    scales = scales_with(1.0)
    assert integers(scales, 0, 1.0, 4.0, 7.96, 8.0, 1e9, -1e9) == [
        2**12,
        2**14,
        round(7.96 * 2**12),
        LIMIT,
        LIMIT,
        -LIMIT,
    ]
    just_below = 2 - 2.0**-23  # the least headroom
    scales = scales_with(just_below)
    assert integers(scales, 0, 1.99 * just_below, 3.98 * just_below, 4 * just_below)[2] == LIMIT
    assert LIMIT / 2 ** (OPERAND_BITS - HEADROOM) > 3.98


def test_a_pass_saturates_what_is_too_large_and_only_that() -> None:
    pass_ = TrainingPass(nn.Linear(1, 1), scales_with(1.0))
    for largest in (LIMIT / 2**12, 8.0, 1e30, math.inf):
        values = torch.tensor([largest, 1.0, -largest])
        found = pass_.integers(values, 0).integers.tolist()
        assert found == [LIMIT, 2**12, -LIMIT] == quantise(values, 12).tolist()


def test_a_tensor_of_zeros_keeps_its_scale() -> None:
    scales = scales_with(1.0, 4.0)
    scales.observe(0, torch.zeros(3))
    scales.observe(1, torch.ones(3))
    scales.end_step()
    assert scales.before.tolist() == [1.0, 1.0]


def test_a_tensor_without_a_scale_gets_its_first_one_at_once() -> None:
    scales = scales_with(0.0, 2.0)
    assert not scales.complete()
    scales.start(0, torch.zeros(2))
    assert not scales.complete()
    scales.start(0, torch.tensor([3.0, -5.0]))
    scales.start(1, torch.tensor([100.0]))  # it has one
    assert scales.complete()
    assert scales.before.tolist() == [5.0, 2.0]
    assert integers(scales, 0, 5.0) == [5 * 2**10]


def test_room_for_more_tensors_and_a_checkpoint() -> None:
    scales = scales_with(2.0)
    scales.observe(0, torch.ones(1))
    scales.extend(3)
    assert scales.before.tolist() == [2.0, 0.0, 0.0]
    assert scales.now.tolist() == [1.0, 0.0, 0.0]
    again = Scales(torch.device("cpu"))
    again.restore(scales.before)
    scales.before.zero_()  # the other one has a copy
    assert again.before.tolist() == [2.0, 0.0, 0.0]
    assert len(again) == 3


def test_cut_batches_observe_the_same() -> None:
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    for pieces in (1, 2, 37):
        scales = scales_with(1.0)
        for part in reversed(x.tensor_split(pieces)):
            scales.observe(0, part)
        found.append(scales.now.clone())
    assert all(torch.equal(each, x.abs().max().view(1)) for each in found)


def test_each_sample_of_an_evaluation_has_its_own() -> None:
    x = torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]], [[0.001, 0.0]]])
    found = sample_exponents(x)
    assert found.shape == (3, 1, 1)
    assert found.flatten().tolist() == [12, 59, 23]  # 14 bits: nothing larger is to come
    assert torch.equal(sample_exponents(x[2:]), found[2:])
    assert sample_exponents(torch.zeros(2, 0)).shape == (2, 1)
