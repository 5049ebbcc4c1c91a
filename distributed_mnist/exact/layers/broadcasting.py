"""Operations on each element, of tensors of different shapes.

What is broadcast gets a gradient that is a sum over its copies: over samples if it is a parameter, and
otherwise within a sample.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ordered_sums import sum_over
from ..passes.interface import Pass
from ..refusal import Refused

_SUMS = {"add", "sub", "subtract", "rsub"}


def elementwise(pass_: Pass, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`, one operation on each element. Tensors are expanded first.

    Raises `Refused` for `alpha`, with which torch does two operations at once.
    """
    positional = len(args) > 2 and function.__name__.strip("_") in _SUMS  # an old form: add(x, alpha, y)
    if kwargs.get("alpha", 1) != 1 or positional:
        raise Refused("alpha has no exact form: multiply first")
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if not any(each.requires_grad for each in tensors):
        return function(*args, **kwargs)
    shape = broadcast_shape(*(each.shape for each in tensors))

    def expand(each: Any) -> Any:
        return expanded(pass_, each, shape) if isinstance(each, Tensor) else each

    return function(*map(expand, args), **{name: expand(each) for name, each in kwargs.items()})


def broadcast_shape(*shapes: torch.Size) -> torch.Size:
    """Return the shape to which these are broadcast. Raises ValueError if there is none.

    `torch.broadcast_shapes` would import a library for symbolic algebra.
    """
    return torch.Size(np.broadcast_shapes(*shapes))


def expanded(pass_: Pass, x: Tensor, shape: torch.Size) -> Tensor:
    """Return `x` expanded to a shape, with an exact gradient.

    A tensor without gradient may stay as it is, because torch expands it. The shape of a parameter's copy
    must have a dimension of samples.
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return x
    if pass_.view_of(x) is not None:
        return ExpandedParameter.apply(x, shape, pass_)  # type: ignore[no-any-return]
    return x if x.shape == shape else Expanded.apply(x, shape)  # type: ignore[no-any-return]


def expand(pass_: Pass, x: Tensor, *sizes: Any) -> Tensor:
    """Return an activation expanded as `Tensor.expand` does."""
    result = x.detach().expand(*sizes)
    return x if result.shape == x.shape else Expanded.apply(x, result.shape)  # type: ignore[no-any-return]


def expand_as(pass_: Pass, x: Tensor, other: Tensor) -> Tensor:
    """Return an activation in the shape of another tensor."""
    return expand(pass_, x, other.shape)


class ExpandedParameter(torch.autograd.Function):
    """A parameter, or a view of one, expanded to a shape with samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, pass_: Pass) -> Tensor:
        ctx.pass_, ctx.shape, ctx.number = pass_, x.shape, pass_.number()
        ctx.sum = pass_.sum_over_samples(x, ctx.number)
        return x.expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (gradient,) = gradients
        integers = ctx.pass_.integers(gradient, ctx.number).integers
        if dims := _copied_dims(gradient.shape, ctx.shape):
            integers = integers.sum(dims, dtype=torch.int64)
        ctx.pass_.add(ctx.sum, integers.reshape(ctx.shape).to(torch.float64))
        return None, None, None


class Expanded(torch.autograd.Function):
    """An activation, expanded within each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = x.shape
        return x.expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.to(torch.float64)
        for dim in reversed(_copied_dims(gradient.shape, ctx.shape)):
            total = sum_over(total, dim)
        return total.to(torch.float32).reshape(ctx.shape), None


def _copied_dims(shape: torch.Size, original: torch.Size) -> list[int]:
    """Return the dimensions in which a tensor of the original shape was copied."""
    new = len(shape) - len(original)
    return [d for d in range(len(shape)) if d < new or original[d - new] != shape[d]]


def divide(pass_: Pass, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor:
    """Return `x / y`. A GPU would multiply by the reciprocal of a Python number, so `y` becomes a
    tensor."""
    if rounding_mode is not None:
        raise Refused("a division with rounding_mode has no exact form")
    # A GPU also multiplies by the reciprocal of a tensor with one number on the CPU.
    device = max((each for each in (x, y) if isinstance(each, Tensor)), key=Tensor.dim).device
    x, y = (
        each.to(device, torch.float32)
        if isinstance(each, Tensor)
        else torch.full((), each, dtype=torch.float32, device=device)
        for each in (x, y)
    )
    return elementwise(pass_, Quotient.apply, x, y)  # type: ignore[no-any-return]


def divide_reversed(pass_: Pass, x: Tensor, y: Any) -> Tensor:
    """Return `y / x`."""
    return divide(pass_, y, x)


def divide_(pass_: Pass, x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Tensor:
    """Divide in place."""
    return x.copy_(divide(pass_, x, y, rounding_mode=rounding_mode))


class Quotient(torch.autograd.Function):
    """A quotient of two tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        y = y + 0  # the sign of a zero depends on the order of additions
        # Not the result, which may be changed.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, y)
        return x / y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, y = ctx.saved_tensors
        share = gradient / y
        of_x, of_y = ctx.needs_input_grad
        return share if of_x else None, (share * (x / y)).neg_() if of_y else None


def power(pass_: Pass, x: Tensor, exponent: Any) -> Tensor:
    """Return `x**exponent`. Raises `Refused` for exponents other than 1, 2 and 3."""
    if isinstance(exponent, Tensor) or exponent not in (1, 2, 3):
        raise Refused("a power, except the second and the third, has no exact form")
    result = x
    for _ in range(int(exponent) - 1):
        result = elementwise(pass_, torch.mul, result, x)
    return result


def square(pass_: Pass, x: Tensor) -> Tensor:
    """Return `x * x`."""
    return power(pass_, x, 2)
