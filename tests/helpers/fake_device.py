"""A device beside the CPU, for machines without one: `torch.device("fake")`.

Its tensors are computed on the CPU, but torch and the program see another device, which is torch's
accelerator. An operation on tensors of both kinds fails as it does on a GPU, and so does `.numpy()`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library
from torch.utils import _pytree as pytree
from torch.utils import backend_registration as registration

from distributed_mnist.exact.elementary import sqrt

NAME = "fake"
_register: Any = getattr(registration, "_setup_privateuseone_for_python_backend", None)
AVAILABLE = _register is not None
"""Whether this version of torch can have a device that is written in Python."""
_aten: Any = torch.ops.aten

_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_FACTORIES = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.eye.default,
    _aten.linspace.default,
)
_RESHAPING = (_aten.resize_.default, _aten.set_.source_Storage_storage_offset)  # the latter in a deep copy
_set_data: Any = vars(torch._C.TensorBase)["data"].__set__
_libraries: list[library.Library] = []  # they register for as long as they live


class OnFake(Tensor):
    """A tensor that says it is on the fake device. `held` has its values, on the CPU."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnFake":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnFake({self.held!r})"

    def tolist(self) -> Any:  # torch has none for subclasses
        return self.held.tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: "OnFake") -> None:
        self.held = other.held

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on another device to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, *args, **(kwargs or {}))


class _Module:
    """`torch.fake`: one device, whose generator is never used."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass


def set_up() -> None:
    """Make the device known to torch in this process, for good."""
    _register(NAME, _Module())
    others, aten = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    _libraries.extend((others, aten))
    others.fallback(_compute, "PrivateUse1")
    for operation in _FACTORIES:
        aten.impl(operation, partial(_make, operation), "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.accelerator.synchronize = lambda *_: None  # which this kind of backend cannot have


def _make(operation: Any, *args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
    return OnFake(operation(*args, device=torch.device("cpu"), **kwargs))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnFake) else value


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation on the CPU. Its results are on the fake device, but for copies to the CPU."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func not in _COPIES and any(not isinstance(t, OnFake) and t.dim() > 0 for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == NAME
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    known = {id(_held(t)): t for t in tensors}
    args, kwargs = pytree.tree_map(_held, (args, kwargs))

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else OnFake(value) if stays else value

    if func in (_aten.sqrt.default, _aten.sqrt.out):
        func = sqrt
    result = pytree.tree_map(shown, func(*args, **kwargs))
    if func in _RESHAPING:
        _set_data(tensors[0], OnFake(_held(tensors[0])))
    return result
