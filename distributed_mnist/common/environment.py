"""Settings for the libraries below us: environment variables, where the user's own come first, and
malloc's."""

import contextlib
import ctypes
import os
import re

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
_MIB = 2**20
_THEIRS = re.compile(r"(OMP|KMP|GOMP|MKL|ONEDNN|DNNL|ATEN|TORCH|NCCL|GLOO|CUDA|CUBLAS|HIP|ROCR|ZE)_\w+")
_OURS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def settings() -> dict[str, str]:
    """The user's variables that change what torch and the libraries below it do: name to value, by name."""
    names = sorted(name for name in os.environ if _THEIRS.fullmatch(name))
    return {name: os.environ[name] for name in names if os.environ[name] != _OURS.get(name)}


def order_additions() -> None:
    """cuBLAS adds in a fixed order only if it is told how much workspace to use."""
    _set("CUBLAS_WORKSPACE_CONFIG")


def keep_torch_quiet() -> None:
    """A process that is lost is told in one line of ours: torch's C++ adds a page of frames as a warning.

    Read when torch is imported.
    """
    _set("TORCH_CPP_LOG_LEVEL")


def _set(name: str) -> None:
    os.environ.setdefault(name, _OURS[name])


def use_interface(interface: str) -> None:
    """gloo uses the interface that this host's own name resolves to: on many hosts that is the loopback,
    which leads to no other host."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def keep_memory() -> None:
    """Let the C library keep the memory that is freed, for the next step needs as much again.

    Otherwise it gives large blocks back to the kernel, and each page that it asks for anew costs a fault
    and is filled with zeros: two fifths of a step's time (docs/explanation/performance.md). Only glibc has
    these settings.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the most it takes
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB)
        mallopt(_M_TOP_PAD, 64 * _MIB)
