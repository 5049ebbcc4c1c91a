"""Replace the functions of torch that a model calls by exact ones, while it runs.

A model's code does not change: `ExactFunctions` is a `TorchFunctionMode`, through which torch passes every
call. Layers (`LAYERS`) have their own exact implementation. Single operations on each element
(`ELEMENTWISE`) and copies (`VIEWS`, `COPIES`) are exact in torch, apart from sums in their gradients. All
others are refused.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, resolve_name

from .layers import attention, broadcasting
from .layers.broadcasting import elementwise, expanded
from .layers.table import CONSTANTS, COPIES, ELEMENTWISE, LAYERS, QUESTIONS, VIEWS
from .parameter_views import follow, is_activation, mark_activation, with_samples
from .passes.interface import Pass
from .passes.training_pass import TrainingPass
from .refusal import Refused, advice

_WEIGHTS = {
    "weight", "bias", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", "q_proj_weight",
    "k_proj_weight", "v_proj_weight",
}  # fmt: skip
"""Arguments of layers that may be parameters. Others must be activations."""

_PRODUCTS = {attention.matmul, attention.rmatmul}
_DIVISIONS = {broadcasting.divide, broadcasting.divide_reversed, broadcasting.divide_}

_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}

_EXPANSIONS: set[Any] = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to}

_REPEATED_GRADIENTS: set[Any] = {Tensor.repeat, Tensor.unfold, torch.broadcast_to}


class ExactFunctions(TorchFunctionMode):
    """Inside this context, what a model computes is exact.

    Raises `Refused`, which names the function, if it has no exact form here. In training, it also follows
    which tensors are computed from images (activations) and which are views of parameters.
    """

    def __init__(self, pass_: Pass) -> None:
        super().__init__()
        self._pass = pass_
        self._training = isinstance(pass_, TrainingPass)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call what replaces `func`."""
        kwargs = kwargs or {}
        if kwargs and func in LAYERS:
            args, kwargs = _with_our_names(args, kwargs)
        is_getter = getattr(func, "__name__", "") == "__get__"
        if func in QUESTIONS:
            return func(*args, **kwargs)
        if not is_getter and not any(
            func in known for known in (LAYERS, ELEMENTWISE, VIEWS, COPIES, CONSTANTS)
        ):
            raise Refused(f"{_name(func)} has no exact form{advice(_name(func))}")
        result = self._in_training(func, args, kwargs) if self._training else self._call(func, args, kwargs)
        for each in _tensors((result,)):
            if each.dtype not in (torch.float32, torch.bool) and _may_round(func, args, each):
                raise Refused(
                    f"{_name(func)} of {str(each.dtype).removeprefix('torch.')} has no exact form"
                )
        return result

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in LAYERS:
            return LAYERS[func](self._pass, *args, **kwargs)
        if func in ELEMENTWISE:
            return elementwise(self._pass, func, *args, **kwargs)
        if func is torch.arange and not all(_is_whole(each) for each in (*args, *kwargs.values())):
            raise Refused("torch.arange, except of whole numbers, has no exact form")
        if torch.is_grad_enabled() and any(
            each.requires_grad for each in _tensors((*args, *kwargs.values()))
        ):
            _require_exact_gradient(func, args, kwargs)
        return func(*args, **kwargs)

    def _in_training(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = _tensors((*args, *kwargs.values()))
        parameters = [each for each in tensors if self._pass.view_of(each) is not None]
        from_images = any(map(is_activation, tensors))
        for each in tensors:
            if each.requires_grad and not is_activation(each) and self._pass.view_of(each) is None:
                raise Refused(
                    f"{_name(func)} of what an autograd.Function or a compiled function has computed "
                    "has no exact form"
                )
        if parameters:
            is_view = func in VIEWS or func in _EXPANSIONS or getattr(func, "__name__", "") == "__get__"
            if is_view and args and self._pass.view_of(args[0]) is not None:
                return self._view(func, args, kwargs)
            args, kwargs, used = self._parameters_as_activations(func, args, kwargs, from_images)
            from_images = from_images or used
        result = self._call(func, args, kwargs)
        if from_images and func not in CONSTANTS:
            for each in _tensors((result,)):
                mark_activation(each)
        return result

    def _view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return a view of a parameter."""
        result = follow(self._pass, func, *args, **kwargs)
        if func in _EXPANSIONS:
            before, after = args[0].shape, result.shape
            new = len(after) - len(before)
            if any(
                size == self._pass.samples and (dim < new or before[dim - new] == 1)
                for dim, size in enumerate(after)
            ):
                with_samples(result)
        return result

    def _parameters_as_activations(
        self, func: Any, args: Any, kwargs: dict[str, Any], from_images: bool
    ) -> tuple[Any, dict[str, Any], bool]:
        """Replace parameters that `func` would use as activations, or refuse. Return its arguments, and
        whether there was one."""
        layer, used = LAYERS.get(func), False
        is_elementwise = func in ELEMENTWISE or layer in _DIVISIONS
        if layer in _PRODUCTS and from_images:
            return args, kwargs, False

        def as_activation(x: Any) -> Any:
            nonlocal used
            if isinstance(x, list | tuple):
                return type(x)(map(as_activation, x)) if not isinstance(x, torch.Size) else x
            view = self._pass.view_of(x) if isinstance(x, Tensor) else None
            if view is None:
                return x
            # Expanded there, to the shape of all: a size that equals the number of samples proves nothing.
            if is_elementwise and from_images:
                return x
            if view.has_samples:
                used = True
                return self._marked(expanded(self._pass, x, x.shape))
            if is_elementwise and with_copies:
                return x
            raise Refused(f"{_name(func)} of a parameter alone has no exact gradient")

        with_copies = any(
            (view := self._pass.view_of(each)) is not None and view.has_samples
            for each in _tensors((*args, *kwargs.values()))
        )
        if layer is None or layer in _DIVISIONS:
            return tuple(map(as_activation, args)), {k: as_activation(v) for k, v in kwargs.items()}, used
        bound = inspect.signature(layer).bind(self._pass, *args, **kwargs)
        for name, value in bound.arguments.items():
            if name not in _WEIGHTS:
                bound.arguments[name] = as_activation(value)
        return bound.args[1:], bound.kwargs, used

    def _marked(self, x: Tensor) -> Tensor:
        mark_activation(x)
        return x


def are_exact() -> bool:
    """Return whether this code is inside the context `ExactFunctions`."""
    return isinstance(_get_current_function_mode(), ExactFunctions)


def _require_exact_gradient(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse copies whose gradient torch adds in an order of its own."""
    if func in _REPEATED_GRADIENTS or (
        func is F.pad and (args[2:3] or (kwargs.get("mode"),))[0] not in (None, "constant")
    ):
        raise Refused(f"the gradient of {_name(func)} has no exact form")
    if func is Tensor.__getitem__ and not all(
        each is None or each is ... or isinstance(each, int | slice) for each in _flat(args[1])
    ):
        raise Refused("the gradient of an index by a tensor or a list has no exact form: use slices")
    if func is Tensor.copy_ and len({each.shape for each in _tensors((*args, *kwargs.values()))}) > 1:
        raise Refused("the gradient of torch.Tensor.copy_ to another shape has no exact form: use expand")


def _with_our_names(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a layer without torch's names of operands and NumPy's names of others."""
    kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
    first = [kwargs.pop(name) for name in ("input", "self") if name in kwargs]
    others = [kwargs.pop(name) for name in ("other", "mat2") if name in kwargs]
    return (*first, *args, *others), kwargs


def _flat(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _may_round(func: Any, args: Any, result: Tensor) -> bool:
    """Return whether this result, not float32, may depend on the machine: as integers from floats do that
    are out of range, or the bits of a zero."""
    if result.is_floating_point() or result.is_complex():
        return True
    return (func in COPIES or func in VIEWS) and any(each.is_floating_point() for each in _tensors(args))


def _is_whole(value: Any) -> bool:
    return not isinstance(value, float) or value.is_integer()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among these values, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", str(func))
