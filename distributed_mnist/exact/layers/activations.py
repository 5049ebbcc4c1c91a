"""Functions of each element that need more than one operation, computed in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..elementary import erf as erf_of
from ..elementary import exp as exp_of
from ..elementary import log as log_of
from ..elementary import sigmoid as sigmoid_of
from ..elementary import sqrt as sqrt_of
from ..elementary import tanh as tanh_of
from ..passes.interface import Pass
from ..refusal import Refused

_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_SQRT_TWO_OVER_PI = float.fromhex("0x1.9884533d43651p-1")
_ONE_OVER_SQRT_TWO_PI = float.fromhex("0x1.9884533d43651p-2")
_SELU = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

ValueAndDerivative = Callable[[Tensor], tuple[Tensor, Tensor]]


class Pointwise(torch.autograd.Function):
    """A function of each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: ValueAndDerivative) -> Tensor:
        value, derivative = compute(x.to(torch.float64))
        ctx.save_for_backward(derivative.to(torch.float32))
        return value.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _layer(compute: ValueAndDerivative) -> Callable[..., Tensor]:
    def layer(pass_: Pass, x: Tensor, inplace: bool = False) -> Tensor:
        result = Pointwise.apply(x, compute)
        return x.copy_(result) if inplace else result  # type: ignore[no-any-return]

    return layer


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    y = sigmoid_of(x)
    return y, (1 - y).mul_(y)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    y = tanh_of(x)
    return y, (y * y).neg_().add_(1)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = sigmoid_of(x)
    return x * s, (1 - s).mul_(x).add_(1).mul_(s)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    below = erf_of(x * _SQRT_HALF).add_(1).mul_(0.5)  # the normal distribution function
    density = exp_of((x * x).mul_(-0.5)).mul_(_ONE_OVER_SQRT_TWO_PI)
    return x * below, density.mul_(x).add_(below)


def _gelu_by_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    square = x * x
    t = tanh_of((square * 0.044715).add_(1).mul_(x).mul_(_SQRT_TWO_OVER_PI))
    slope = (square * (3 * 0.044715)).add_(1).mul_(_SQRT_TWO_OVER_PI)
    half = (t + 1).mul_(0.5)
    return x * half, (t * t).neg_().add_(1).mul_(slope).mul_(x).mul_(0.5).add_(half)


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    y = exp_of(x)
    return y, y


def _log(x: Tensor) -> tuple[Tensor, Tensor]:
    return log_of(x), x.reciprocal()


def _sqrt(x: Tensor) -> tuple[Tensor, Tensor]:
    y = sqrt_of(x)
    return y, (y + y).reciprocal_()


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    above = x.clamp(min=0)  # log(1 + exp(x)) without overflow
    return log_of(exp_of(x.abs().neg_()).add_(1)).add_(above), sigmoid_of(x)


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    value, derivative = _softplus(-x)
    return value.neg_(), derivative


def _mish(x: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _softplus(x)
    t = tanh_of(value)
    return x * t, (t * t).neg_().add_(1).mul_(slope).mul_(x).add_(t)


sigmoid, tanh, silu, mish = _layer(_sigmoid), _layer(_tanh), _layer(_silu), _layer(_mish)
exp, log, sqrt, log_sigmoid = _layer(_exp), _layer(_log), _layer(_sqrt), _layer(_log_sigmoid)
_exact_gelu, _gelu_of_tanh, _plain_softplus = _layer(_gelu), _layer(_gelu_by_tanh), _layer(_softplus)


def gelu(pass_: Pass, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return GELU, float32, as `torch.nn.functional.gelu` defines it."""
    return (_gelu_of_tanh if approximate == "tanh" else _exact_gelu)(pass_, x)


def softplus(pass_: Pass, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Return `log(1 + exp(x))`, float32. Raises `Refused` for another `beta`."""
    if beta != 1:
        raise Refused("softplus with beta has no exact form")
    return _plain_softplus(pass_, x)


def elu(pass_: Pass, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Return ELU, float32: `x`, or `alpha * (exp(x) - 1)` below zero."""
    return _elu(pass_, x, alpha, 1.0, inplace)


def selu(pass_: Pass, x: Tensor, inplace: bool = False) -> Tensor:
    """Return SELU, float32."""
    return _elu(pass_, x, *_SELU, inplace)


def _elu(pass_: Pass, x: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        power = exp_of(x.clamp(max=0)).mul_(alpha)
        value = torch.where(x > 0, x, power - alpha)
        return value.mul_(scale), torch.where(x > 0, 1.0, power).mul_(scale)

    return _layer(compute)(pass_, x, inplace)
