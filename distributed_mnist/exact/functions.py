"""Replace the functions of torch that a model calls by exact ones, while it runs.

A model's code does not change: `ExactFunctions` is a `TorchFunctionMode`, through which torch passes every
call. Layers (`LAYERS`) have their own exact implementation. Single operations on each element
(`ELEMENTWISE`) and copies (`VIEWS`, `COPIES`) are exact in torch, apart from sums in their gradients. All
others are refused.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from .function_arguments import name_of, parameters_as_activations, tensors_in, with_our_names
from .function_limits import require_exact_result, require_exact_use
from .layers.broadcasting import elementwise
from .layers.table import CONSTANTS, COPIES, ELEMENTWISE, LAYERS, QUESTIONS, VIEWS
from .parameter_views import follow, is_activation, mark_activation, with_samples
from .passes.interface import Pass
from .passes.training_pass import TrainingPass
from .refusal import Refused, advice

_EXPANSIONS: set[Any] = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to}


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
            args, kwargs = with_our_names(args, kwargs)
        is_getter = getattr(func, "__name__", "") == "__get__"
        if func in QUESTIONS:
            return func(*args, **kwargs)
        if not is_getter and not any(
            func in known for known in (LAYERS, ELEMENTWISE, VIEWS, COPIES, CONSTANTS)
        ):
            raise Refused(f"{name_of(func)} has no exact form{advice(name_of(func))}")
        result = self._in_training(func, args, kwargs) if self._training else self._call(func, args, kwargs)
        require_exact_result(func, args, result)
        return result

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in LAYERS:
            return LAYERS[func](self._pass, *args, **kwargs)
        if func in ELEMENTWISE:
            return elementwise(self._pass, func, *args, **kwargs)
        require_exact_use(func, args, kwargs)
        return func(*args, **kwargs)

    def _in_training(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in((*args, *kwargs.values()))
        parameters = [each for each in tensors if self._pass.view_of(each) is not None]
        from_images = any(map(is_activation, tensors))
        for each in tensors:
            if each.requires_grad and not is_activation(each) and self._pass.view_of(each) is None:
                raise Refused(
                    f"{name_of(func)} of what an autograd.Function or a compiled function has computed "
                    "has no exact form"
                )
        if parameters:
            is_view = func in VIEWS or func in _EXPANSIONS or getattr(func, "__name__", "") == "__get__"
            if is_view and args and self._pass.view_of(args[0]) is not None:
                return self._view(func, args, kwargs)
            args, kwargs, used = parameters_as_activations(self._pass, func, args, kwargs, from_images)
            from_images = from_images or used
        result = self._call(func, args, kwargs)
        if from_images and func not in CONSTANTS:
            for each in tensors_in((result,)):
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


def are_exact() -> bool:
    """Return whether this code is inside the context `ExactFunctions`."""
    return isinstance(_get_current_function_mode(), ExactFunctions)
