"""Which functions of torch have an exact form, and which one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, attention, broadcasting, dropout, normalisation, pooling, reductions
from .convolution import conv2d
from .linear import linear

LAYERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear, F.conv2d: conv2d, torch.conv2d: conv2d, F.max_pool2d: pooling.max_pool2d,
    torch.max_pool2d: pooling.max_pool2d, F.avg_pool2d: pooling.avg_pool2d, F.adaptive_avg_pool2d:
    pooling.adaptive_avg_pool2d, F.adaptive_max_pool2d: pooling.adaptive_max_pool2d, torch.mean:
    reductions.mean, Tensor.mean: reductions.mean, torch.sum: reductions.sum_, Tensor.sum: reductions.sum_,
    torch.amax: reductions.amax, Tensor.amax: reductions.amax, torch.max: reductions.max_, Tensor.max:
    reductions.max_, F.layer_norm: normalisation.layer_norm, F.group_norm: normalisation.group_norm,
    F.instance_norm: normalisation.instance_norm, F.rms_norm: normalisation.rms_norm, F.dropout:
    dropout.dropout, F.dropout1d: dropout.feature_dropout, F.dropout2d: dropout.feature_dropout, F.softmax:
    attention.softmax, torch.softmax: attention.softmax, Tensor.softmax: attention.softmax, F.log_softmax:
    attention.log_softmax, torch.log_softmax: attention.log_softmax, Tensor.log_softmax:
    attention.log_softmax, torch.logsumexp: attention.logsumexp, Tensor.logsumexp: attention.logsumexp,
    torch.matmul: attention.matmul, Tensor.matmul: attention.matmul,
    Tensor.__rmatmul__: attention.rmatmul, torch.bmm: attention.matmul, Tensor.bmm: attention.matmul,
    torch.mm: attention.matmul, Tensor.mm: attention.matmul, F.scaled_dot_product_attention:
    attention.scaled_dot_product_attention, F.multi_head_attention_forward:
    attention.multi_head_attention_forward, F.gelu: activations.gelu, F.silu: activations.silu, F.mish:
    activations.mish, F.elu: activations.elu, F.selu: activations.selu, F.softplus: activations.softplus,
    F.logsigmoid: activations.log_sigmoid, torch.sigmoid: activations.sigmoid, Tensor.sigmoid:
    activations.sigmoid, F.sigmoid: activations.sigmoid, torch.tanh: activations.tanh, Tensor.tanh:
    activations.tanh, F.tanh: activations.tanh, torch.exp: activations.exp, Tensor.exp: activations.exp,
    torch.log: activations.log, Tensor.log: activations.log, torch.sqrt: activations.sqrt, Tensor.sqrt:
    activations.sqrt, torch.div: broadcasting.divide, Tensor.div: broadcasting.divide, Tensor.true_divide:
    broadcasting.divide, Tensor.__truediv__: broadcasting.divide, Tensor.__rtruediv__:
    broadcasting.divide_reversed, Tensor.div_: broadcasting.divide_, Tensor.__itruediv__:
    broadcasting.divide_, torch.pow: broadcasting.power, Tensor.pow: broadcasting.power, Tensor.__pow__:
    broadcasting.power, torch.square: broadcasting.square, Tensor.square: broadcasting.square,
    Tensor.expand: broadcasting.expand, Tensor.expand_as: broadcasting.expand_as,
}  # fmt: skip
"""What is called instead of a function, with the pass as an additional first argument."""

ELEMENTWISE: set[Any] = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.hardtanh,
    F.threshold, torch.add, torch.sub, torch.mul, torch.neg, torch.abs, torch.maximum, torch.minimum,
    torch.where, torch.clamp, torch.masked_fill, torch.rsub, torch.subtract, torch.multiply,
    Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.sub, Tensor.sub_,
    Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__, Tensor.mul, Tensor.mul_, Tensor.__mul__,
    Tensor.__rmul__, Tensor.__imul__, Tensor.neg, Tensor.__neg__, Tensor.abs, Tensor.clamp, Tensor.clamp_,
    Tensor.clamp_min, Tensor.clamp_max, Tensor.maximum, Tensor.minimum, Tensor.where, Tensor.masked_fill,
    Tensor.masked_fill_, Tensor.eq, Tensor.ne, Tensor.lt, Tensor.le, Tensor.gt, Tensor.ge, Tensor.__eq__,
    Tensor.logical_not, Tensor.logical_and, Tensor.logical_or, Tensor.__and__, Tensor.__or__,
    Tensor.__invert__, Tensor.sign, torch.sign, Tensor.isnan,
}  # fmt: skip
"""Single operations on each element, and their gradients too."""

VIEWS: set[Any] = {
    torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute,
    torch.permute, Tensor.t, torch.t, Tensor.transpose, torch.transpose, torch.swapaxes, Tensor.swapaxes,
    Tensor.movedim, torch.movedim, Tensor.contiguous, Tensor.clone, Tensor.unsqueeze, torch.unsqueeze,
    Tensor.squeeze, torch.squeeze, Tensor.__getitem__, Tensor.narrow, torch.narrow, Tensor.select,
    Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind, Tensor.__iter__,
    Tensor.unflatten, torch.unflatten, Tensor.flip, torch.flip, Tensor.view_as, Tensor.reshape_as,
}  # fmt: skip
"""Views and copies of one tensor, in which each element appears at most once."""

COPIES: set[Any] = {
    torch.cat, torch.concat, torch.stack, F.pad, Tensor.unfold, Tensor.repeat, Tensor.detach, Tensor.float,
    Tensor.to, Tensor.type, Tensor.type_as, Tensor.copy_,
}  # fmt: skip
"""Copies of several tensors or with several copies of an element, and conversions."""

CONSTANTS: set[Any] = {
    torch.zeros, torch.ones, torch.full, torch.empty, torch.tensor, torch.as_tensor, torch.arange,
    torch.eye, torch.zeros_like, torch.ones_like, torch.full_like, torch.tril, torch.triu, Tensor.tril,
    Tensor.triu, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor, Tensor.fill_,
    Tensor.zero_,
}  # fmt: skip
"""Tensors with fixed values. They have no dimension of samples."""

QUESTIONS: set[Any] = {
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_contiguous, Tensor.__len__,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.element_size, Tensor.ndimension,
    Tensor.get_device, torch._C._set_grad_enabled, torch.is_tensor, torch.numel, Tensor.nelement,
    Tensor.requires_grad_, Tensor.data_ptr, Tensor.is_complex, torch.is_complex,
}  # fmt: skip
"""What does not compute."""
