"""Set environment variables for torch and its libraries, and options of malloc.

A variable that the user has set keeps its value.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator

from . import import_path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
_MIB = 2**20
_HEAP, _HUGE_PAGE, _MADV_HUGEPAGE = 256 * _MIB, 2 * _MIB, 14  # the last is of <sys/mman.h> on Linux
_LIBRARY_VARIABLES = re.compile(
    r"(OMP|KMP|GOMP|MKL|ONEDNN|DNNL|ATEN|TORCH|NCCL|GLOO|CUDA|CUBLAS|HIP|ROCR|ZE)_\w+"
)
_KERNEL_VARIABLES = re.compile(
    r"(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)"
    r"|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)|OPENBLAS_CORETYPE|BLIS_ARCH_TYPE"
    r"|CUBLAS(LT)?_WORKSPACE_\w+|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_\w+|TORCH_BLAS_PREFER_\w+"
    r"|TORCH_CUDNN_\w+|DISABLE_ADDMM_CUDA_LT|MIOPEN_\w+|HSA_OVERRIDE_\w+|GLIBC_TUNABLES"
)
"""They choose kernels, so they change the last bits. ATEN_CPU_CAPABILITY is not among them, because torch
tells what it chooses."""
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_DEFAULTS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "GOMP_SPINCOUNT": "1000",  # without it 300,000, which is hardly faster
    "TORCHINDUCTOR_DETERMINISTIC": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def settings() -> dict[str, str]:
    """Return the user's variables that affect torch and its libraries: name to value, sorted by name."""
    names = sorted(name for name in os.environ if _LIBRARY_VARIABLES.fullmatch(name))
    return {name: os.environ[name] for name in names if os.environ[name] != _DEFAULTS.get(name)}


def kernel_settings() -> dict[str, str]:
    """Return the user's variables that choose the kernels of torch and its libraries: name to value."""
    found = {}
    for name in sorted(filter(_KERNEL_VARIABLES.fullmatch, os.environ)):
        if os.environ[name] != _DEFAULTS.get(name):  # DNNL is oneDNN's earlier name, and comes second there
            found[re.sub("^DNNL_", "ONEDNN_", name)] = os.environ[name]
    return dict(sorted(found.items()))


def threads() -> int | None:
    """Return the number of threads that the user asks of OpenMP, or None."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None


def thread_binding() -> list[str]:
    """Return the names of the user's variables that bind threads to cores.

    OpenMP binds a process when torch is imported. Processes that may use the same cores, as they do if one
    launcher on this host starts them, are then all bound to the first of these cores.
    """
    if os.environ.get("OMP_PROC_BIND", "").lower() == "false":
        return []
    return [name for name in _BINDING if name in os.environ]


@contextlib.contextmanager
def for_workers() -> Iterator[None]:
    """Prepare the environment of workers, which are started in this context.

    They import nothing from the current folder, they are not all bound to one core, their threads wait
    briefly, and a user's model sees the elements of a set of strings always in the same order.
    """
    changed = {**import_path.variables(), "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}
    changed |= _brief_waits()
    unbound = thread_binding()
    before = {name: os.environ.get(name) for name in (*changed, *unbound)}
    os.environ.update(changed)
    for name in unbound:
        del os.environ[name]
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def order_additions() -> None:
    """Make cuBLAS and `torch.compile`, if a user's model calls it, add in a fixed order.

    cuBLAS does so only with a workspace of fixed size. `torch.compile` otherwise times several kernels and
    uses the fastest.
    """
    _set("CUBLAS_WORKSPACE_CONFIG")
    _set("TORCHINDUCTOR_DETERMINISTIC")


def wait_briefly() -> None:
    """Make threads of OpenMP that wait for others sleep soon. Call it before torch is imported.

    They would keep their cores for milliseconds. If other programs need these too, a step then takes many
    times as long, because what the threads wait for does not run meanwhile.
    """
    os.environ.update(_brief_waits())


def _brief_waits() -> dict[str, str]:
    asked = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {} if asked else {"GOMP_SPINCOUNT": _DEFAULTS["GOMP_SPINCOUNT"]}


def keep_torch_quiet() -> None:
    """Turn off warnings of torch's C++ code. Call it before torch is imported.

    When a process is lost, this program prints one line; torch would add a long stack trace as a warning.
    """
    _set("TORCH_CPP_LOG_LEVEL")


def _set(name: str) -> None:
    os.environ.setdefault(name, _DEFAULTS[name])


def use_interface(interface: str) -> None:
    """Make gloo use this network interface.

    By default it uses the interface that the host's own name resolves to. On many hosts that is loopback,
    which does not reach other hosts.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def keep_memory() -> None:
    """Make the C library keep freed memory, because the next step needs the same amount again.

    Otherwise it returns large blocks to the kernel. Each new memory page then costs a page fault and is
    filled with zeros, which takes two fifths of a step's time (docs/explanation/performance.md). Only glibc
    has these settings.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the largest value that it accepts
        library.mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB)
        _grow_heap(library)
        library.mallopt(_M_TOP_PAD, 64 * _MIB)


def _grow_heap(library: ctypes.CDLL) -> None:
    """Enlarge the heap, and ask Linux for pages of 2 MiB there, whose addresses it translates faster.

    The new part takes no memory until it is used. Where it cannot be had, nothing changes.
    """
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mallopt(_M_TOP_PAD, _HEAP)
    block = library.malloc(16 * _MIB)  # more than the heap has left, so it grows by this and `_HEAP`
    start, end = -(-(block or 0) // _HUGE_PAGE) * _HUGE_PAGE, library.sbrk(0)
    if 0 < end - start <= 2 * _HEAP:  # otherwise the block is not in the heap
        library.madvise(start, (end - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    library.free(block)
