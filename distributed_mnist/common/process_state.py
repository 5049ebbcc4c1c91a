"""Run code in a defined state of the process, and restore the caller's state afterwards.

Many settings of torch change results, and a caller or a model may have changed them: precision, kernels,
autocast, gradient mode, default dtype and device. With `torch_defaults` they have torch's default values.
`defined_state` also restores the number of threads and the global generators, and runs in one thread at a
time.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.overrides
from torch.utils._python_dispatch import _disable_current_modes

from .generators import restored_generators, seed_generators


class _Setting(NamedTuple):
    """A setting of torch, its functions, and torch's default value."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    default: Any


def _attribute(name: str, default: Any) -> _Setting:
    """Return the setting `torch.backends.NAME`."""
    *path, last = name.split(".")
    owner: Any = torch.backends
    for part in path:
        owner = getattr(owner, part)
    return _Setting(name, lambda: getattr(owner, last), lambda value: setattr(owner, last, value), default)


def _precision(backend: str, operation: str, default: str) -> _Setting:
    """Return the precision of float32 products. "ieee" is read as "none", which means the same here."""

    def read() -> str:
        value = torch._C._get_fp32_precision_getter(backend, operation)
        return "none" if value == "ieee" and default == "none" else value

    def write(value: str) -> None:
        torch._C._set_fp32_precision_setter(backend, operation, value)

    return _Setting(f"{backend} {operation} fp32_precision", read, write, default)


def _of_thread(name: str, read: Callable[..., Any], write: Callable[..., Any], *values: Any) -> _Setting:
    """Return a setting for one kind of device, or of a name; the last of `values` is the default."""
    *first, default = values
    return _Setting(name, lambda: read(*first), lambda value: write(*first, value), default)


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0.0


_PROCESS = (
    _Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    # Before the precisions of single operations, which it changes.
    _Setting(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
    ),
    _precision("generic", "all", "none"),
    _precision("mkldnn", "all", "none"),
    _precision("mkldnn", "matmul", "none"),
    _precision("mkldnn", "conv", "none"),
    _precision("mkldnn", "rnn", "none"),
    _precision("cuda", "all", "none"),
    _precision("cuda", "matmul", "none"),
    _attribute("cudnn.allow_tf32", True),  # it also sets the next two
    _precision("cuda", "conv", "tf32"),
    _precision("cuda", "rnn", "tf32"),
    _attribute("mkldnn.enabled", True),
    _attribute("mkldnn.deterministic", False),
    _Setting("nnpack", torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled, True),
    _attribute("opt_einsum.enabled", torch.backends.opt_einsum.is_available()),
    _attribute("cudnn.enabled", True),
    _attribute("cudnn.benchmark", False),
    _attribute("cudnn.deterministic", False),
    _attribute("cuda.matmul.allow_fp16_reduced_precision_reduction", True),
    _attribute("cuda.matmul.allow_bf16_reduced_precision_reduction", True),
    _attribute("cuda.matmul.allow_fp16_accumulation", False),
    _Setting(
        "flash attention", torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, True
    ),
    _Setting(
        "memory-efficient attention",
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
        True,
    ),
    _Setting(
        "cuDNN attention", torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, True
    ),
    _Setting(
        "attention by products",
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.enable_math_sdp,
        True,
    ),
    _Setting("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
)
"""Settings of the whole process."""

_THREAD = (
    _of_thread("autocast (cpu)", torch.is_autocast_enabled, torch.set_autocast_enabled, "cpu", False),
    _of_thread("autocast (cuda)", torch.is_autocast_enabled, torch.set_autocast_enabled, "cuda", False),
    _of_thread(
        "autocast dtype (cpu)", torch.get_autocast_dtype, torch.set_autocast_dtype, "cpu", torch.bfloat16
    ),
    _of_thread(
        "autocast dtype (cuda)", torch.get_autocast_dtype, torch.set_autocast_dtype, "cuda", torch.float16
    ),
    _Setting("autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, True),
    _Setting("flush_denormal", _flushes_denormals, torch.set_flush_denormal, False),
)
"""Settings of the current thread."""

_CHOSEN = (
    _Setting("number of threads", torch.get_num_threads, torch.set_num_threads, None),
    # Not by `torch.use_deterministic_algorithms`, which imports torch's compiler.
    _Setting(
        "deterministic algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
        0,
    ),
    _Setting(
        "fill uninitialized memory",
        torch._C._get_deterministic_fill_uninitialized_memory,
        torch._C._set_deterministic_fill_uninitialized_memory,
        True,
    ),
)
"""Settings that a run chooses (`training.platforms`)."""


def _read_one(setting: _Setting) -> Any:
    try:
        return setting.read()
    except RuntimeError:  # torch refuses to read a precision that its old and new functions have both set
        return None


def _read(settings: tuple[_Setting, ...]) -> list[Any]:
    return [_read_one(setting) for setting in settings]


def _write(settings: tuple[_Setting, ...], values: list[Any]) -> None:
    for setting, value in zip(settings, values, strict=True):
        if value is not None and _read_one(setting) != value:
            setting.write(value)


def _defaults(settings: tuple[_Setting, ...]) -> list[Any]:
    return [setting.default for setting in settings]


class _ProcessDefaults:
    """Gives `_PROCESS` its defaults while at least one thread is inside `held`."""

    def __init__(self) -> None:
        self._mutex, self._inside, self._before = threading.Lock(), 0, list[Any]()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Give the settings their defaults. The last thread to leave restores the caller's values."""
        with self._mutex:
            if not self._inside:
                self._before = _read(_PROCESS)
            self._inside += 1
            _write(_PROCESS, _defaults(_PROCESS))
        try:
            yield
        finally:
            with self._mutex:
                self._inside -= 1
                _write(_PROCESS, _defaults(_PROCESS) if self._inside else self._before)


_process_defaults = _ProcessDefaults()
_one_at_a_time = threading.RLock()


def _forget_other_threads() -> None:
    """In a forked process: locks that another thread held would never be released."""
    global _process_defaults, _one_at_a_time
    _process_defaults, _one_at_a_time = _ProcessDefaults(), threading.RLock()


os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run the body with torch's default settings, then restore the caller's. Threads may do so together."""
    with ExitStack() as stack:
        stack.enter_context(_process_defaults.held())
        stack.enter_context(_no_function_modes())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(_no_saved_tensor_hooks())
        stack.enter_context(_no_open_autocast())
        stack.callback(_write, _THREAD, _read(_THREAD))
        _write(_THREAD, _defaults(_THREAD))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        yield


@contextmanager
def defined_state() -> Iterator[None]:
    """Run the body as `torch_defaults` does, in one thread at a time, and restore the global generators.

    Another thread waits until the first has left. A thread that is inside may enter again.
    """
    with _one_at_a_time, torch_defaults(), restored_generators():
        before = _read(_CHOSEN)
        _write(_CHOSEN, _defaults(_CHOSEN))
        seed_generators("start")
        try:
            yield
        finally:
            _write(_CHOSEN, before)


def snapshot() -> dict[str, Any]:
    """Return the value of every setting, by name, for `changes`."""
    settings = (*_PROCESS, *_THREAD, *_CHOSEN)
    return dict(zip([setting.name for setting in settings], _read(settings), strict=True))


def changes(before: dict[str, Any]) -> str:
    """Return which settings have changed since a snapshot, as text; empty if none."""
    now = snapshot()
    return ", ".join(
        f"{name} from {value} to {now[name]}" for name, value in before.items() if now[name] != value
    )


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Take off the function modes, of which the default device is one, and put them on again."""
    devices = torch._GLOBAL_DEVICE_CONTEXT
    default_device = getattr(devices, "device_context", None)
    modes = [torch.overrides._pop_mode() for _ in range(torch.overrides._len_torch_function_stack())]
    devices.device_context = None
    try:
        yield
    finally:
        while torch.overrides._len_torch_function_stack():  # a default device that was set inside
            torch.overrides._pop_mode()
        devices.device_context = default_device
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    """Take off the hooks that change what autograd saves, and put them on again."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 - not in the stubs
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def _no_open_autocast() -> Iterator[None]:
    """Count as outside every `autocast`: only the outermost one clears the cache of converted weights."""
    torch.clear_autocast_cache()
    depth = 0
    while torch.autocast_decrement_nesting() >= 0:
        depth += 1
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for _ in range(depth):
            torch.autocast_increment_nesting()
