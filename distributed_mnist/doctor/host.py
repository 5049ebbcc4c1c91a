"""Examine one host for `dmnist doctor`: versions, processor, memory, devices, names, disk and data."""

import errno
import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

from ..common import environment
from ..common.compute_platform import fast_instructions, processor_name
from ..common.installed import version
from ..common.placement import physical_cores, usable_cores
from ..data import datasets
from ..distributed.peer import Peer
from ..errors import DataError, reason
from ..runs.lock import NO_LOCKS
from .findings import Finding, bad, doubtful, good, run_probe

_OLDEST_TORCH = (2, 9)
_CHECKPOINT_BYTES = 8 * 2**20
"""About the size of a checkpoint of the larger models."""
_MIN_FREE_DISK = 2**30
_MIN_SHARED_MEMORY = 2**28
_REPORT = "report this line; the other lines do not depend on it"


def affinity() -> set[int]:
    """Return the cores that this process is bound to; all cores if the system does not support binding."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def examine(peers: list[Peer], rank: int, local_size: int, host_cores: int) -> list[Finding]:
    """Examine the host of this rank.

    It runs `local_size` ranks, which together are bound to `host_cores` cores.
    """
    return [
        run_probe("versions", _versions, "install the program again"),
        run_probe("processor", lambda: _processor(local_size, host_cores), _REPORT),
        run_probe("threads", lambda: _threads(local_size), _REPORT),
        run_probe("settings", _settings, _REPORT),
        run_probe("memory", _memory, "look at the host's memory"),
        run_probe("devices", _devices, "check the driver and torch's build"),
        run_probe("open files", _open_files, "ulimit -n 4096"),
        run_probe("host name", lambda: _name(peers, rank), "put the host's name into /etc/hosts or DNS"),
    ]


def nearest_folder(out: Path) -> Path:
    """Return `out`, or the nearest existing folder above it. Raises `OSError` if a file is in the way."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, not a folder", str(nearest))
    return nearest


def disk(out: Path) -> Finding:
    """Check whether checkpoints can be written under `out`, how fast, and whether file locks work there."""
    folder = out
    try:
        folder = nearest_folder(out)
        with tempfile.TemporaryDirectory(prefix=".dmnist-doctor-", dir=folder) as temporary:
            began = time.perf_counter()
            with (Path(temporary) / "part").open("wb") as file:
                file.write(os.urandom(_CHECKPOINT_BYTES))
                file.flush()
                os.fsync(file.fileno())
                has_locks = _can_lock(file)
            (Path(temporary) / "part").replace(Path(temporary) / "whole")
            seconds = time.perf_counter() - began
    except OSError as error:
        return bad(f"{folder}: {reason(error)}", "choose another --out, or make room there")
    free = shutil.disk_usage(folder).free
    value = f"{folder}: {free / 2**30:,.1f} GiB free, 8 MiB on disk in {1e3 * seconds:.0f} ms"
    if free < _MIN_FREE_DISK:
        return doubtful(value, "make room: on a full disk checkpoints are lost, but the run continues")
    if not has_locks:
        return doubtful(
            f"{value}; no locks", "never start two runs in one folder: nothing stops the second"
        )
    if seconds > 5:
        return doubtful(value, "the disk is slow: use --checkpoint-every '1 minute'")
    return good(value)


def _can_lock(file: BinaryIO) -> bool:
    """Lock a file; return False if its file system has no locks. Raises `OSError`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def data(dataset: str, folder: Path) -> Finding:
    """Check whether the data files are there and their checksums right. Downloads nothing."""
    if dataset in ("generated", "auto", "idx"):
        return good(f"{dataset}: nothing to check")
    try:
        files = datasets.check(dataset, folder)
    except DataError as error:
        return doubtful(str(error), f"dmnist data fetch {dataset} --data {folder}")
    damaged = [f"{file.path.name} {file.verdict}" for file in files if not file.ok]
    if damaged:
        return bad("; ".join(damaged), f"remove it, then dmnist data fetch {dataset} --data {folder}")
    return good(f"{dataset} in {folder}: {len(files)} files, checksums right")


def _versions() -> Finding:
    names = ("distributed-mnist", "torch", "numpy")
    packages = [f"{'dmnist' if name == names[0] else name} {version(name)}" for name in names]
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    libc = " ".join(platform.libc_ver()).strip()  # empty without glibc
    value = ", ".join([*packages, system, *([libc] if libc else []), platform.machine()])
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < _OLDEST_TORCH:
        return bad(value, "torch 2.9 or later is needed")
    return good(value)


def _processor(local_size: int, host_cores: int) -> Finding:
    cores, load = usable_cores(), psutil.getloadavg()[0]
    # A container's quota is shared by all ranks of the host. Without one the bindings of all ranks count,
    # because a launcher may bind each rank to its own core.
    if cores >= len(affinity()):
        cores = host_cores
    instructions = fast_instructions() or torch.backends.cpu.get_cpu_capability()
    value = (
        f"{processor_name()}, {instructions}; {cores} usable cores of {psutil.cpu_count()}, load {load:.1f}"
    )
    if torch.accelerator.is_available():
        return good(value)
    if local_size > cores:
        advice = f"{local_size} processes share {cores} cores: same answer, slower than {cores} processes"
        return doubtful(value, advice)
    return good(value)


def _threads(local_size: int) -> Finding:
    """Report the threads per process. Only exact arithmetic takes them from OMP_NUM_THREADS."""
    in_exact = environment.threads() or 1
    divided = max(1, physical_cores() // local_size)
    exact = f"{in_exact} with --precision exact (OMP_NUM_THREADS)"
    return good(f"1 a process with --sync tree, {divided} with ddp, {exact}")


def _settings() -> Finding:
    settings = [f"{name}={value}" for name, value in environment.settings().items()]
    return good(", ".join(settings) or "none for torch, OpenMP, MKL, NCCL or gloo")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    available, limit = memory.available, ""
    if (container := _memory_limit()) is not None and container[0] < memory.total:
        most, used = container
        available = min(available, most - used)
        limit = f" (the container's limit is {most / 2**30:.1f})"
    value = f"{available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available{limit}"
    if (shared := _shared_memory()) is not None:
        value += f"; /dev/shm {shared / 2**30:.1f} GiB free"
        if shared < _MIN_SHARED_MEMORY and torch.accelerator.is_available():
            return doubtful(value, "NCCL passes data through /dev/shm: docker run --shm-size=1g")
    if available < 2**30:
        return doubtful(value, "a process needs about half a GiB: end other programs on this host")
    return good(value)


def _shared_memory(folder: Path = Path("/dev/shm")) -> int | None:
    """Return the free bytes of shared memory; None if the system has no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _memory_limit(group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Return the bytes that the container may use, and those that it uses, not counting cached files.

    Returns None if there is no limit.
    """
    try:
        limit, used = [(group / name).read_text() for name in ("memory.max", "memory.current")]
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        return int(limit), int(used) - int(cached[1] if cached else 0)
    except (OSError, ValueError):  # not Linux, an older cgroup, or "max"
        return None


def _devices() -> Finding:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        build = "CPU build of torch" if "+cpu" in torch.__version__ else "torch finds no GPU"
        if Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists():
            return doubtful(f"a GPU, but {build}", "install torch's build for it")
        return good(f"CPU ({build})")
    module = torch.get_device_module(kind)
    names = [_device_name(module, i) for i in range(torch.accelerator.device_count())]
    counted = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]  # noqa: RUF001
    build = torch.version.cuda or torch.version.hip or ""
    return good(f"{kind.type}: {', '.join(counted)} {build}".rstrip())


def _device_name(module: Any, index: int) -> str:
    """Return the device's name and memory if torch knows them; for Apple's devices it knows neither."""
    name = "unnamed device"
    try:
        name = str(module.get_device_name(index))
        return f"{name} ({module.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
    except (AttributeError, RuntimeError):
        return name


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 512:
        return doubtful(f"at most {soft}", "ulimit -n 4096")
    return good(f"at most {soft}")


def _name(peers: list[Peer], rank: int) -> Finding:
    """Check that the hosts' names resolve here, and this host's own name to an address others can use."""
    hosts = sorted({peer.host for peer in peers})
    unknown = []
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unknown.append(host)
    several = len(hosts) > 1
    if unknown:
        problem = f"{', '.join(unknown)} cannot be resolved"
        if not several:
            return good(f"{problem}: not needed on a single host")
        advice = "put it into /etc/hosts or DNS; training uses addresses, so it may still work"
        return doubtful(problem, advice)
    own = peers[rank].host
    address = socket.getaddrinfo(own, None)[0][4][0]
    if several and str(address).startswith("127."):
        return doubtful(f"{own} is {address} here", "give it its network address in /etc/hosts")
    return good(", ".join(hosts))
