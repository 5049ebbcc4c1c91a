"""Linear layers."""

from typing import Any

import torch
from torch import Tensor

from ..passes.interface import Pass
from ..passes.weights import product_factor
from ..products.interface import Rows


def linear(pass_: Pass, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, float32 `(..., out)`, of float32 `(..., in)`; see
    `torch.nn.functional`.

    Sums have `in` terms forward, `out` terms in the gradient of `x`, and as many terms as there are rows in
    the gradient of the weight. Their operands are at most `LIMIT`, so they are exact up to 2**23 terms.
    """
    return Product.apply(x, weight, bias, pass_)  # type: ignore[no-any-return]


def forward_matrix(weight: Tensor) -> list[Tensor]:
    """Return the matrix by which a linear layer multiplies rows: `(in, out)`."""
    return [weight.t()]


def backward_matrix(weight: Tensor) -> list[Tensor]:
    """Return the matrix by which it multiplies the gradients of its results: `(out, in)`."""
    return [weight]


class Product(torch.autograd.Function):
    """Rows times a weight, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pass_: Pass) -> Tensor:
        number = pass_.number()
        rows = pass_.quantise(x.reshape(-1, x.shape[-1]), number)
        slices = pass_.products.slices(rows.integers, rows.integers.shape[1])
        prepared = pass_.weight(weight, "forward", forward_matrix)
        result = pass_.products.multiply(slices, prepared.prepared[0])
        result *= product_factor(rows.exponent, prepared.exponent)
        if bias is not None:
            result += bias
        ctx.slices, ctx.pass_, ctx.weight, ctx.shape = slices, pass_, weight, x.shape
        ctx.number = pass_.number() if any(ctx.needs_input_grad) else 0
        ctx.sums = (
            pass_.sum_over_samples(weight, number, ctx.number),
            pass_.sum_over_samples(bias, ctx.number),
        )
        return result.resize_(*x.shape[:-1], result.shape[1])  # not a view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        pass_, products = ctx.pass_, ctx.pass_.products
        fixed = pass_.quantise(gradient, ctx.number)
        rows = fixed.integers.reshape(-1, gradient.shape[-1])
        add_sums(pass_, ctx.sums, rows, ctx.slices)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        prepared = pass_.weight(ctx.weight, "backward", backward_matrix)
        result = products.multiply(products.slices(rows, rows.shape[1]), prepared.prepared[0])
        result *= product_factor(fixed.exponent, prepared.exponent)
        return result.view(ctx.shape), None, None, None


def add_sums(pass_: Pass, sums: tuple[int | None, int | None], rows: Tensor, inputs: Rows) -> None:
    """Add the gradients of a weight, `rows.T @ inputs`, and of a bias, the sum of `rows`, to these sums.

    `rows`, the gradients of results, are packed `(M, out)`; `inputs` are rows `(M, in)`.
    """
    of_weight, of_bias = sums
    if of_weight is not None:
        pass_.add(of_weight, pass_.products.transposed_times(rows, inputs), len(rows))
    if of_bias is not None:
        pass_.add(of_bias, pass_.products.sum_of(rows))
