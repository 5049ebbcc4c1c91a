"""Test that clipping is torch's to rounding, and that its norm is added in one fixed order."""

import pytest
import torch
from torch import nn

from distributed_mnist.optim.clipping import clip_gradients

SHAPES = [(5,), (3, 4, 3, 3), (1,), (7, 129)]


def parameters_with_gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient


@pytest.mark.parametrize(("scale", "clips"), [(1e-3, False), (1.0, True), (1e6, True)])
def test_clips_as_torch_does(scale: float, clips: bool) -> None:
    ours, theirs = parameters_with_gradients(scale), parameters_with_gradients(scale)
    norm = clip_gradients(ours, 1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.0))
    for mine, other, before in zip(ours, theirs, parameters_with_gradients(scale), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
        assert mine.grad is None or torch.equal(mine.grad, before.grad) != clips  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad: float) -> None:
    parameters = parameters_with_gradients(1.0)
    assert parameters[0].grad is not None
    parameters[0].grad[2] = bad
    clip_gradients(parameters, 1.0)
    assert parameters[0].grad.isnan().any()


def test_the_norm_does_not_depend_on_the_number_of_threads() -> None:
    """torch's own sum of a million numbers does."""
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    threads, norms = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            p = nn.Parameter(torch.zeros_like(values))
            p.grad = values.clone()
            norms.append(clip_gradients([p], 1.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*norms)
    torch.testing.assert_close(norms[0].double(), values.double().norm(), rtol=1e-6, atol=0)
