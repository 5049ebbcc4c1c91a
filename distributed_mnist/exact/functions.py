"""Replace the functions of torch that a model calls by exact ones, while it runs.

A model's code does not change: `ExactFunctions` is a `TorchFunctionMode`, through which torch passes every
call. Layers (`LAYERS`) have their own exact implementation. Single operations on each element and copies
(`AS_THEY_ARE`) are exact in torch. All others are refused.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from .layers.convolution import conv2d
from .layers.linear import linear
from .layers.pooling import max_pool2d
from .layers.reductions import mean
from .passes import Pass
from .refusal import Refused

LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    F.conv2d: conv2d,
    torch.conv2d: conv2d,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    torch.mean: mean,
    Tensor.mean: mean,
}
"""What is called instead of a function, with the pass as an additional first argument."""

AS_THEY_ARE: set[Callable[..., Any]] = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, torch.flatten, Tensor.flatten, Tensor.view,
    Tensor.reshape, torch.reshape, Tensor.permute, torch.permute, Tensor.unfold, Tensor.t, torch.t,
    Tensor.transpose, torch.transpose, Tensor.contiguous, Tensor.clone, Tensor.unsqueeze, torch.unsqueeze,
    Tensor.squeeze, torch.squeeze, Tensor.__getitem__, Tensor.narrow, Tensor.size, Tensor.dim,
    Tensor.stride, Tensor.numel, Tensor.is_contiguous, Tensor.__len__, F.pad, torch.cat, torch.stack,
    Tensor.detach, Tensor.is_floating_point, Tensor.float,
}  # fmt: skip
"""Single operations on each element, copies, and questions about a tensor."""


class ExactFunctions(TorchFunctionMode):
    """Inside this context, what a model computes is exact.

    Raises `Refused`, which names the function, if it has no exact form here.
    """

    def __init__(self, pass_: Pass) -> None:
        super().__init__()
        self._pass = pass_

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call what replaces `func`."""
        layer = LAYERS.get(func)
        if layer is not None:
            return layer(self._pass, *args, **(kwargs or {}))
        if func in AS_THEY_ARE or getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        raise Refused(f"{resolve_name(func) or func} has no exact form")
