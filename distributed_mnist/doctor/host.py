"""What `dmnist doctor` looks at on each host: versions, processor, memory, devices, names, disk, data."""

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
from typing import Any

import psutil
import torch

from ..common import environment
from ..common.installed import version
from ..common.placement import usable_cores
from ..data import datasets
from ..distributed.membership import Peer
from ..errors import DataError
from .findings import Finding, bad, doubtful, good, tried

_OLDEST_TORCH = (2, 9)
_CHECKPOINT_BYTES = 8 * 2**20
"""About what a checkpoint of the larger models takes."""
_LEAST_FREE = 2**30
_LEAST_SHARED = 2**28
_REPORT = "report this line: the rest stands without it"


def affinity() -> set[int]:
    """The cores that this process is bound to; every one where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def examine(peers: list[Peer], rank: int, local_size: int, together: int) -> list[Finding]:
    """What is to be said of the host of this rank, which has `local_size` of the ranks, bound to so many
    cores together."""
    return [
        tried("versions", _versions, "install the program again"),
        tried(
            "processor",
            lambda: _processor(local_size, together),
            _REPORT,
        ),
        tried("threads", lambda: _threads(local_size), _REPORT),
        tried("settings", _settings, _REPORT),
        tried("memory", _memory, "look at the host's memory"),
        tried("devices", _devices, "check the driver and torch's build"),
        tried("open files", _open_files, "ulimit -n 4096"),
        tried("host name", lambda: _name(peers, rank), "put the host's name into /etc/hosts or DNS"),
    ]


def nearest_folder(out: Path) -> Path:
    """Where `out` is, or where it would be made. Raises OSError if a file is in the way."""
    place = next(one for one in (out.absolute(), *out.absolute().parents) if one.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, not a folder", str(place))
    return place


def disk(out: Path) -> Finding:
    """Whether checkpoints can be written under `out`, how fast, and whether a lock holds there."""
    place = out
    try:
        place = nearest_folder(out)
        with tempfile.TemporaryDirectory(prefix=".dmnist-doctor-", dir=place) as folder:
            began = time.perf_counter()
            with (Path(folder) / "part").open("wb") as file:
                file.write(os.urandom(_CHECKPOINT_BYTES))
                file.flush()
                os.fsync(file.fileno())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (Path(folder) / "part").replace(Path(folder) / "whole")
            seconds = time.perf_counter() - began
    except OSError as error:
        told = (error.strerror or str(error)).lower()
        return bad("checkpoints", f"{place}: {told}", "choose another --out, or make room there")
    free = shutil.disk_usage(place).free
    value = f"{place}: {free / 2**30:,.1f} GiB free, 8 MiB on disk in {1e3 * seconds:.0f} ms"
    if free < _LEAST_FREE:
        return doubtful("checkpoints", value, "make room: a full disk costs checkpoints, not the run")
    if seconds > 5:
        return doubtful("checkpoints", value, "a slow disk: --checkpoint-every '1 minute'")
    return good("checkpoints", value)


def data(dataset: str, folder: Path) -> Finding:
    """Whether the data are there and what their checksums say. Nothing is downloaded."""
    if dataset in ("generated", "auto", "idx"):
        return good("data", f"{dataset}: nothing to check")
    try:
        found = datasets.check(dataset, folder)
    except DataError as error:
        return doubtful("data", str(error), f"dmnist data fetch {dataset} --data {folder}")
    wrong = [f"{finding.path.name} {finding.verdict}" for finding in found if not finding.ok]
    if wrong:
        return bad("data", "; ".join(wrong), f"remove it, and dmnist data fetch {dataset} --data {folder}")
    return good("data", f"{dataset} in {folder}: {len(found)} files, checksums right")


def _versions() -> Finding:
    names = ("distributed-mnist", "torch", "numpy")
    told = [f"{'dmnist' if name == names[0] else name} {version(name)}" for name in names]
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    library = " ".join(platform.libc_ver())  # empty where there is no glibc
    value = ", ".join([*told, system, *([library] if library.strip() else []), platform.machine()])
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < _OLDEST_TORCH:
        return bad("versions", value, "torch 2.9 or later is needed")
    return good("versions", value)


def _processor(local_size: int, together: int) -> Finding:
    own, load = usable_cores(), psutil.getloadavg()[0]
    # A launcher may bind each rank to a core of its own; a container's quota is for all of them.
    cores = own if own < len(affinity()) else together
    value = (
        f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}; {cores} usable cores of "
        f"{psutil.cpu_count()}, load {load:.1f}"
    )
    if torch.accelerator.is_available():
        return good("processor", value)
    if local_size > cores:
        advice = f"{local_size} processes share {cores} cores: same answer, slower than {cores}"
        return doubtful("processor", value, advice)
    return good("processor", value)


def _threads(local_size: int) -> Finding:
    """Of the arithmetic in a process: training sets them itself, whatever a launcher's variable says."""
    divided = max(1, usable_cores() // local_size)
    return good(
        "threads", f"1 a process with --sync tree, {divided} with ddp; OMP_NUM_THREADS is not asked"
    )


def _settings() -> Finding:
    told = [f"{name}={value}" for name, value in environment.settings().items()]
    return good("settings", ", ".join(told) or "none for torch, OpenMP, MKL, NCCL or gloo")


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    available, limit = memory.available, ""
    if (allowed := _memory_limit()) is not None and allowed[0] < memory.total:
        available = min(available, allowed[0] - allowed[1])
        limit = f" (the container's limit is {allowed[0] / 2**30:.1f})"
    value = f"{available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available{limit}"
    if (shared := _shared_memory()) is not None:
        value += f"; /dev/shm {shared / 2**30:.1f} GiB free"
        if shared < _LEAST_SHARED and torch.accelerator.is_available():
            return doubtful("memory", value, "NCCL passes data through /dev/shm: docker run --shm-size=1g")
    if available < 2**30:
        return doubtful("memory", value, "a process needs about half a GiB: end what else runs here")
    return good("memory", value)


def _shared_memory(place: Path = Path("/dev/shm")) -> int | None:
    """Free bytes of it; None where there is none."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _memory_limit(group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Bytes that a container may take, and those that it has without what is only cached of files; None
    where nothing limits it."""
    try:
        words = [(group / name).read_text() for name in ("memory.max", "memory.current")]
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        return int(words[0]), int(words[1]) - int(cached[1] if cached else 0)
    except (OSError, ValueError):  # not Linux, an older cgroup, or "max"
        return None


def _devices() -> Finding:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        build = "CPU build of torch" if "+cpu" in torch.__version__ else "torch finds none"
        if Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists():
            return doubtful("devices", f"a GPU, but {build}", "install torch's build for it")
        return good("devices", f"CPU ({build})")
    module = torch.get_device_module(kind)
    names = [_device_name(module, i) for i in range(torch.accelerator.device_count())]
    counted = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]  # noqa: RUF001
    build = torch.version.cuda or torch.version.hip or ""
    return good("devices", f"{kind.type}: {', '.join(counted)} {build}".rstrip())


def _device_name(module: Any, index: int) -> str:
    """With its memory, where torch tells that; of Apple's it does not even tell a name."""
    name = "one without a name"
    try:
        name = str(module.get_device_name(index))
        return f"{name} ({module.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
    except (AttributeError, RuntimeError):
        return name


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 512:
        return doubtful("open files", f"at most {soft}", "ulimit -n 4096")
    return good("open files", f"at most {soft}")


def _name(peers: list[Peer], rank: int) -> Finding:
    """Whether the hosts' names resolve here, and this host's own to what others can use."""
    hosts = sorted({peer.host for peer in peers})
    unknown = []
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unknown.append(host)
    several = len(hosts) > 1
    if unknown:
        told = f"{', '.join(unknown)} cannot be resolved"
        way = "put it into /etc/hosts or DNS; training goes by address, so it may work all the same"
        return (
            doubtful("host name", told, way) if several else good("host name", f"{told}: not needed alone")
        )
    own = peers[rank].host
    address = socket.getaddrinfo(own, None)[0][4][0]
    if several and str(address).startswith("127."):
        return doubtful(
            "host name", f"{own} is {address} here", "give it its network address in /etc/hosts"
        )
    return good("host name", ", ".join(hosts))
