"""Uses of torch's functions that are not exact, although others of the same function are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .function_arguments import name_of, tensors_in
from .layers.table import COPIES, VIEWS
from .refusal import Refused

_REPEATED_GRADIENTS: set[Any] = {Tensor.repeat, Tensor.unfold, torch.broadcast_to}


def require_exact_use(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise `Refused` if a function would round with these arguments, or if torch would add its gradient in
    an order that it chooses."""
    if func is torch.arange and not all(_is_whole(each) for each in (*args, *kwargs.values())):
        raise Refused("torch.arange, except of whole numbers, has no exact form")
    if torch.is_grad_enabled() and any(
        each.requires_grad for each in tensors_in((*args, *kwargs.values()))
    ):
        _require_exact_gradient(func, args, kwargs)


def require_exact_result(func: Any, args: Any, result: Any) -> None:
    """Raise `Refused` if a result may depend on the machine because of its type."""
    for each in tensors_in((result,)):
        if each.dtype not in (torch.float32, torch.bool) and _may_round(func, args, each):
            kind = str(each.dtype).removeprefix("torch.")
            raise Refused(f"{name_of(func)} of {kind} has no exact form")


def _require_exact_gradient(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in _REPEATED_GRADIENTS or (
        func is F.pad and (args[2:3] or (kwargs.get("mode"),))[0] not in (None, "constant")
    ):
        raise Refused(f"the gradient of {name_of(func)} has no exact form")
    if func is Tensor.__getitem__ and not all(
        each is None or each is ... or isinstance(each, int | slice) for each in _flat(args[1])
    ):
        raise Refused("the gradient of an index by a tensor or a list has no exact form: use slices")
    if func is Tensor.copy_ and len({each.shape for each in tensors_in((*args, *kwargs.values()))}) > 1:
        raise Refused("the gradient of torch.Tensor.copy_ to another shape has no exact form: use expand")


def _flat(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _may_round(func: Any, args: Any, result: Tensor) -> bool:
    """Return whether this result, not float32, may depend on the machine: as integers from floats do that
    are out of range, or the bits of a zero."""
    if result.is_floating_point() or result.is_complex():
        return True
    return (func in COPIES or func in VIEWS) and any(each.is_floating_point() for each in tensors_in(args))


def _is_whole(value: Any) -> bool:
    return not isinstance(value, float) or value.is_integer()
