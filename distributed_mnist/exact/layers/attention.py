"""Softmax, products of two activations, and attention made of them."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import ordered_sums
from ..elementary import exp, log
from ..fixed_point import power_of_two
from ..parameter_views import follow
from ..passes.interface import Pass
from ..products.interface import require_exact
from ..refusal import Refused
from .broadcasting import broadcast_shape, elementwise, expanded
from .dropout import dropout
from .linear import linear
from .reductions import mean


def softmax(
    pass_: Pass, x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """Return probabilities along a dimension, float32; see `torch.nn.functional`."""
    return Softmax.apply(x, _dim(dim, dtype), False)  # type: ignore[no-any-return]


def log_softmax(
    pass_: Pass, x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """Return the logarithms of probabilities along a dimension, float32; see `torch.nn.functional`."""
    return Softmax.apply(x, _dim(dim, dtype), True)  # type: ignore[no-any-return]


def _dim(dim: int | None, dtype: Any) -> int:
    if dim is None or dtype not in (None, torch.float32):
        raise Refused("softmax without dim, or of another dtype than float32, has no exact form")
    return dim


class Softmax(torch.autograd.Function):
    """Softmax or its logarithm, along a dimension within a sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, logarithm: bool) -> Tensor:
        function = ordered_sums.log_softmax if logarithm else ordered_sums.softmax
        result = function(x.to(torch.float64), dim).to(torch.float32)
        ctx.save_for_backward(result)
        ctx.dim, ctx.logarithm = dim, logarithm
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].to(torch.float64)
        result = ctx.saved_tensors[0].to(torch.float64)
        if ctx.logarithm:
            total = ordered_sums.sum_over(gradient, ctx.dim).unsqueeze(ctx.dim)
            return (gradient - exp(result).mul_(total)).to(torch.float32), None, None
        total = ordered_sums.sum_over(gradient * result, ctx.dim).unsqueeze(ctx.dim)
        return (gradient - total).mul_(result).to(torch.float32), None, None


def logsumexp(pass_: Pass, x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return the logarithm of the sum of exponentials along a dimension, float32; see `torch.logsumexp`."""
    if not isinstance(dim, int):
        raise Refused("logsumexp over several dimensions has no exact form")
    result = LogSumExp.apply(x, dim)
    return result.unsqueeze(dim) if keepdim else result  # type: ignore[no-any-return]


class LogSumExp(torch.autograd.Function):
    """The logarithm of the sum of exponentials, along a dimension within a sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        largest = x.to(torch.float64).amax(dim, keepdim=True)
        terms = exp(x.to(torch.float64) - largest)
        total = ordered_sums.sum_over(terms, dim).unsqueeze(dim)
        ctx.save_for_backward(terms.div_(total).to(torch.float32))
        ctx.dim = dim
        return log(total).add_(largest).squeeze(dim).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].unsqueeze(ctx.dim) * ctx.saved_tensors[0], None


def matmul(pass_: Pass, left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product, float32, of two activations, or of one and a matrix, as a linear layer.

    Sums have as many terms as `torch.matmul` says, and in the gradients as many as the operands have rows
    or columns. Raises `Refused` if a parameter is not a matrix or a vector.
    """
    if right.ndim == 1:
        return matmul(pass_, left, follow(pass_, Tensor.unsqueeze, right, 1)).squeeze(-1)
    if left.ndim == 1:
        return matmul(pass_, follow(pass_, Tensor.unsqueeze, left, 0), right).squeeze(-2)
    if right.ndim == 2 and pass_.view_of(left) is None:
        return linear(pass_, left, follow(pass_, Tensor.t, right))
    if left.ndim == 2 and pass_.view_of(right) is None:
        return linear(pass_, right.transpose(-1, -2), left).transpose(-1, -2)
    if pass_.view_of(left) is not None or pass_.view_of(right) is not None:
        raise Refused("a product with a parameter that is not a matrix has no exact form")
    batch = broadcast_shape(left.shape[:-2], right.shape[:-2])
    left, right = (
        expanded(pass_, each, torch.Size((*batch, *each.shape[-2:]))).expand(*batch, -1, -1)
        for each in (left, right)
    )
    rows, columns = left.shape[-2], right.shape[-1]
    result = BatchedProduct.apply(
        left.reshape(-1, rows, left.shape[-1]), right.reshape(-1, right.shape[-2], columns), pass_
    )
    return result.view(*batch, rows, columns)  # type: ignore[no-any-return]


def rmatmul(pass_: Pass, right: Tensor, left: Tensor) -> Tensor:
    """Return `left @ right`."""
    return matmul(pass_, left, right)


class BatchedProduct(torch.autograd.Function):
    """The products of matrices `(b, m, k)` and `(b, k, l)`. Both are rounded to integers."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, pass_: Pass) -> Tensor:
        ctx.left = pass_.integers(left, pass_.number())
        ctx.right = pass_.integers(right, pass_.number())
        ctx.pass_, ctx.number = pass_, pass_.number() if any(ctx.needs_input_grad) else 0
        return _batched(pass_, ctx.left, ctx.right)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pass_, left, right = ctx.pass_, ctx.left, ctx.right
        fixed = pass_.integers(gradients[0], ctx.number)
        of_left, of_right, _ = ctx.needs_input_grad
        return (
            _batched(pass_, fixed, right._replace(integers=right.integers.mT)) if of_left else None,
            _batched(pass_, left._replace(integers=left.integers.mT), fixed) if of_right else None,
            None,
        )


def _batched(pass_: Pass, left: Any, right: Any) -> Tensor:
    require_exact(left.integers.shape[2])
    product = torch.bmm(left.integers.to(torch.float64), right.integers.to(torch.float64))
    return product.mul_(power_of_two(-(left.exponent + right.exponent))).to(torch.float32)


def scaled_dot_product_attention(
    pass_: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention, float32 `(..., l, e)`; see `torch.nn.functional`. Raises `Refused` for
    `enable_gqa`."""
    if enable_gqa:
        raise Refused("attention with enable_gqa has no exact form")
    if is_causal:
        attn_mask = torch.ones(
            (query.shape[-2], key.shape[-2]), dtype=torch.bool, device=query.device
        ).tril()
    return _attention(pass_, query, key, value, attn_mask, dropout_p, scale)[0]


def _attention(
    pass_: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention and its weights, after dropout. A boolean mask says which positions to use."""
    query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = matmul(pass_, query, key.transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores = elementwise(pass_, torch.add, scores, mask)
    weights = dropout(pass_, softmax(pass_, scores, -1), dropout_p)
    return matmul(pass_, weights, value), weights


def multi_head_attention_forward(
    pass_: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `torch.nn.MultiheadAttention` computes from `(l, n, e)`, and its weights.

    Raises `Refused` for padding masks and additional keys.
    """
    extras = bias_k, bias_v, static_k, static_v, key_padding_mask
    if query.ndim != 3 or add_zero_attn or any(extra is not None for extra in extras):
        raise Refused(
            "attention of one sample alone, or with padding masks or additional keys, has no exact form"
        )
    size = query.shape[-1]
    biases: Any = (None,) * 3
    if in_proj_bias is not None:
        biases = follow(pass_, torch.chunk, in_proj_bias, 3)
    if in_proj_weight is not None and query is key is value:
        projected = linear(pass_, query, in_proj_weight, in_proj_bias).split(size, -1)
    else:
        weights: Any = q_proj_weight, k_proj_weight, v_proj_weight
        if in_proj_weight is not None:
            weights = follow(pass_, torch.chunk, in_proj_weight, 3)
        inputs = query, key, value
        projected = [linear(pass_, *each) for each in zip(inputs, weights, biases, strict=True)]
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected)  # (n, heads, l, e)
    mask = attn_mask
    if mask is not None:
        mask = mask.logical_not() if mask.dtype == torch.bool else mask  # here it says what to leave out
        if mask.ndim == 3:
            mask = mask.unflatten(0, (-1, num_heads))
    result, used = _attention(pass_, q, k, v, mask, dropout_p if training else 0.0)
    result = linear(pass_, result.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not need_weights:
        return result, None
    return result, mean(pass_, used, 1) if average_attn_weights else used
