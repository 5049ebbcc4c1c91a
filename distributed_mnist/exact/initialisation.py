"""Initial weights with the same bits on every machine, for models as users write them.

torch's random numbers and decompositions differ between versions and processors. In this mode torch's
drawing functions return keyed values instead, so `nn.Linear`, `nn.init.orthogonal_` and the rest work as
they are. The key is the seed of torch's generator and the number of draws since it was seeded. Elementary
functions are replaced by those of `elementary`. All else that computes with floats must be made of single
operations, and is refused otherwise.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..common.generators import DispatchMode
from ..common.random_keys import permutation, random_bits
from . import elementary, initial_values

# Names in torch's dispatcher, without the underscore of in-place variants.
# fmt: off
_SINGLE_OPERATIONS = frozenset([
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "sign", "sgn", "reciprocal", "maximum", "minimum",
    "clamp", "clamp_min", "clamp_max", "relu", "max", "min", "amax", "amin", "aminmax", "argmax", "argmin",
    "sort", "floor", "ceil", "round", "trunc", "eq", "ne", "lt", "le", "gt", "ge", "logical_not",
    "logical_and", "logical_or", "isnan", "isinf", "isfinite", "any", "all", "equal", "where",
])
_COPIES = frozenset([
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "zeros",
    "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full",
    "scalar_tensor", "eye", "fill", "zero", "copy", "clone", "_to_copy", "lift_fresh", "set", "resize",
    "cat", "stack", "repeat", "index", "index_put", "index_select", "index_copy", "index_fill", "gather",
    "scatter", "masked_fill", "flip", "roll", "tril", "triu", "diag_embed", "constant_pad_nd",
    "_local_scalar_dense", "nonzero", "_unsafe_view", "detach", "t", "transpose", "squeeze", "unsqueeze",
])
# fmt: on


class InexactOperation(Exception):
    """A function of torch need not have the same bits on every machine. Its text is the function's name."""


class ExactInitialisation(DispatchMode):
    """The mode in which a model's factory runs. `seed_generators` must have been called."""

    def __init__(self) -> None:
        super().__init__()
        self._draws: Counter[Any] = Counter()
        self._torchs_trunc_normal = nn.init._no_grad_trunc_normal_
        self.may_be_inexact = False
        """Whether nothing is refused, as in a pass that only finds out the shapes of lazy layers."""

    def __enter__(self) -> Self:
        nn.init._no_grad_trunc_normal_ = _trunc_normal
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        nn.init._no_grad_trunc_normal_ = self._torchs_trunc_normal

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation. Raises `InexactOperation` if its result need not be the same everywhere."""
        kwargs = kwargs or {}
        full_name = func.overloadpacket.__name__
        name = full_name.removesuffix("_")
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        if name in _COMPUTED:
            values = _COMPUTED[name](given)
            return _filled(func(*args, **kwargs), values)  # torch's result has the right shape and type
        if full_name in _DRAWN:
            result = func(*args, **kwargs)
            return _filled(result, _DRAWN[full_name](given, tuple(result.shape), self._next_key(given)))
        if func is torch.ops.aten.sort.default:  # the order of equal values depends on the processor
            func, args, kwargs = torch.ops.aten.sort.stable, (), {"stable": True, **given}
        result = func(*args, **kwargs)
        if not self.may_be_inexact and not _is_exact(func, name, args, kwargs, result):
            raise InexactOperation(name)
        return result

    def _next_key(self, given: dict[str, Any]) -> tuple[int | str, ...]:
        generator = given.get("generator") or torch.default_generator
        source = generator, generator.initial_seed()
        self._draws[source] += 1
        return "initial value", source[1], self._draws[source]


def _filled(result: Any, values: Any) -> Any:
    for each, value in (
        zip(result, values, strict=True) if isinstance(result, tuple) else ((result, values),)
    ):
        each.copy_(value)
    return result


def _is_exact(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Return whether an operation has the same result everywhere."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
        return True  # a view
    if name in _COPIES or torch.Tag.view_copy in func.tags:
        return True
    if name in _SINGLE_OPERATIONS:
        # Otherwise there are two operations, which may be fused, as in a product of complex numbers.
        return kwargs.get("alpha", 1) in (1, -1) and not _is_complex(result)
    if name == "arange" and all(float(each).is_integer() for each in args if isinstance(each, int | float)):
        return True
    tensors = [each for each in (*args, *kwargs.values(), result) if isinstance(each, Tensor)]
    return bool(tensors) and not any(each.is_floating_point() or each.is_complex() for each in tensors)


def _is_complex(result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_complex()


def _uniform(given: dict[str, Any], shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return initial_values.uniform(shape, *key).mul_(high - low).add_(low)


def _normal(given: dict[str, Any], shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    return initial_values.normal(shape, *key).mul_(std).add_(mean)


def _integers(given: dict[str, Any], shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    if high is None:
        raise InexactOperation("random_")  # its range depends on the type
    bits = random_bits(int(np.prod(shape)), *key) % np.uint64(high - low)
    return torch.from_numpy(bits.astype(np.int64)).view(shape).add_(low)


def _chosen(given: dict[str, Any], shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    return initial_values.uniform(shape, *key) < given.get("p", 0.5)


def _permutation(given: dict[str, Any], shape: tuple[int, ...], key: tuple[int | str, ...]) -> Tensor:
    return torch.from_numpy(permutation(shape[0], *key))


_DRAWN: dict[str, Callable[[dict[str, Any], tuple[int, ...], tuple[int | str, ...]], Tensor]] = {
    "uniform_": _uniform,
    "rand": _uniform,
    "rand_like": _uniform,
    "normal": _normal,
    "normal_": _normal,
    "randn": _normal,
    "randn_like": _normal,
    "bernoulli_": _chosen,
    "random_": _integers,
    "randint": _integers,
    "randint_like": _integers,
    "randperm": _permutation,
}


def _qr(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if given["A"].ndim != 2 or given.get("mode", "reduced") != "reduced":
        raise InexactOperation("linalg.qr, except of one matrix in mode 'reduced'")
    return initial_values.qr(given["A"].to(torch.float64))


def _linspace(given: dict[str, Any]) -> Tensor:
    start, end, steps = given["start"], given["end"], given["steps"]
    distance = (end - start) / max(steps - 1, 1)
    return torch.arange(steps, dtype=torch.float64).mul_(distance).add_(start)


def _elementary(function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    return lambda given: function(given["self"].to(torch.float64))


_COMPUTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "exp": _elementary(elementary.exp),
    "log": _elementary(elementary.log),
    "sqrt": _elementary(elementary.sqrt),
    "sin": _elementary(lambda x: elementary.sin_and_cos(x)[0]),
    "cos": _elementary(lambda x: elementary.sin_and_cos(x)[1]),
    "sigmoid": _elementary(elementary.sigmoid),
    "tanh": _elementary(elementary.tanh),
    "erf": _elementary(elementary.erf),
    "linspace": _linspace,
    "linalg_qr": _qr,
}


@torch.no_grad()
def _trunc_normal(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a tensor with normal values between bounds, drawing again what is outside.

    It replaces a function of torch whose algorithm is not the same in all versions.
    """
    tensor.normal_(mean, std, generator=generator)
    for _ in range(100):
        outside = (tensor < a) | (tensor > b)
        if not outside.any():
            return tensor
        tensor.copy_(
            torch.where(outside, torch.empty_like(tensor).normal_(mean, std, generator=generator), tensor)
        )
    raise InexactOperation(f"trunc_normal_ with bounds from {a} to {b}, which normal values hardly meet")
