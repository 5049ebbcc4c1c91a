"""Arguments of the functions that exact ones replace: their names, and parameters among them."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from .layers import attention, broadcasting
from .layers.broadcasting import expanded
from .layers.table import ELEMENTWISE, LAYERS
from .parameter_views import mark_activation
from .passes.interface import Pass
from .refusal import Refused

_WEIGHTS = {
    "weight", "bias", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", "q_proj_weight",
    "k_proj_weight", "v_proj_weight",
}  # fmt: skip
"""Arguments of layers that may be parameters. Others must be activations."""

_PRODUCTS = {attention.matmul, attention.rmatmul}
_DIVISIONS = {broadcasting.divide, broadcasting.divide_reversed, broadcasting.divide_}

_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among these values, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def name_of(func: Any) -> str:
    """Return the name of a function of torch, as in its documentation."""
    return resolve_name(func) or getattr(func, "__name__", str(func))


def with_our_names(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a layer without torch's names of operands and NumPy's names of others."""
    kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
    first = [kwargs.pop(name) for name in ("input", "self") if name in kwargs]
    others = [kwargs.pop(name) for name in ("other", "mat2") if name in kwargs]
    return (*first, *args, *others), kwargs


def parameters_as_activations(
    pass_: Pass, func: Any, args: Any, kwargs: dict[str, Any], from_images: bool
) -> tuple[Any, dict[str, Any], bool]:
    """Replace parameters that `func` would use as activations. Return its arguments, and whether there was
    one that has a copy for every sample.

    `from_images` says whether another argument is an activation. Raises `Refused` if none is: the gradient
    of what is computed from parameters alone is no sum over samples.
    """
    layer, used = LAYERS.get(func), False
    is_elementwise = func in ELEMENTWISE or layer in _DIVISIONS
    if layer in _PRODUCTS and from_images:
        return args, kwargs, False

    def as_activation(x: Any) -> Any:
        nonlocal used
        if isinstance(x, list | tuple):
            return type(x)(map(as_activation, x)) if not isinstance(x, torch.Size) else x
        view = pass_.view_of(x) if isinstance(x, Tensor) else None
        if view is None:
            return x
        # Expanded there, to the shape of all: a size that equals the number of samples proves nothing.
        if is_elementwise and from_images:
            return x
        if view.has_samples:
            used = True
            activation = expanded(pass_, x, x.shape)
            mark_activation(activation)
            return activation
        if is_elementwise and with_copies:
            return x
        raise Refused(f"{name_of(func)} of a parameter alone has no exact gradient")

    with_copies = any(
        (view := pass_.view_of(each)) is not None and view.has_samples
        for each in tensors_in((*args, *kwargs.values()))
    )
    if layer is None or layer in _DIVISIONS:
        return tuple(map(as_activation, args)), {k: as_activation(v) for k, v in kwargs.items()}, used
    bound = inspect.signature(layer).bind(pass_, *args, **kwargs)
    for name, value in bound.arguments.items():
        if name not in _WEIGHTS:
            bound.arguments[name] = as_activation(value)
    return bound.args[1:], bound.kwargs, used
