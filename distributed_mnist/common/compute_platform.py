"""Describe the platform of a process: what decides the last bits beside recipe and data."""

import platform as python_platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import environment

_INSTRUCTIONS = re.compile(
    r"avx\w*|fma|f16c|sse4_[12]|amx_\w+"  # x86
    r"|asimd\w*|sve\w*|sme2?|fphp|bf16|i8mm"  # ARM
)
_FAST = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "SVE": {"sve"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "AMX": {"amx_tile"},
}
_WITHOUT_BF16 = re.compile(r"SSE41|AVX|AVX2(_VNNI(_2)?)?|AVX512_CORE(_VNNI)?", re.IGNORECASE)
"""oneDNN's instruction sets without products of bf16 numbers. It ignores a name that it does not know."""
_ON_CPU = ("torch", "build", "machine", "device", "capability", "instructions", "settings")
_ON_GPU = ("torch", "build", "machine", "device", "capability", "processor", "settings")


@dataclass(frozen=True)
class ComputePlatform:
    """A process's platform. All fields are texts; lists in them are separated by commas."""

    torch: str
    """torch's version."""
    build: str
    """The commit that torch was built from, and the version of cuDNN if it is used."""
    machine: str
    device: str
    processor: str
    """The name of the processor or, on a GPU, of the GPU."""
    capability: str
    """The instructions that torch's kernels use: on a CPU as torch reports them, else the device's own."""
    instructions: str
    """The processor's instruction sets. oneDNN and MKL choose their kernels by them."""
    settings: str
    """The variables that choose kernels, as `NAME=value`."""
    libraries: str
    """The versions of the C library and, on a GPU, of its driver."""

    def kernels(self) -> dict[str, str]:
        """Return the fields that decide which kernels compute.

        Equal ones can still choose other kernels on processors with other caches.
        """
        names = set(_ON_CPU if self.device == "cpu" else _ON_GPU)
        limits = {setting.partition("=")[0] for setting in _items(self.settings)}
        if "ONEDNN_MAX_CPU_ISA" in limits and limits & {"MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"}:
            names -= {"instructions"}  # the libraries use no more than the user allows
        return {name: value for name, value in asdict(self).items() if name in names}


def this_platform(device: torch.device) -> ComputePlatform:
    """Describe the platform of `device` on this host."""
    build = [(torch.version.git_version or "unknown")[:10]]
    instructions, libraries = "", [" ".join(python_platform.libc_ver()).strip()]
    if device.type == "cpu":
        processor, capability = processor_name(), torch.backends.cpu.get_cpu_capability()
        instructions = ", ".join(sorted(filter(_INSTRUCTIONS.fullmatch, _processor_flags())))
    elif device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        build.append(f"cuDNN {torch.backends.cudnn.version()}")
        libraries.append(_nvidia_driver())
    else:
        get_name = getattr(getattr(torch, device.type, None), "get_device_name", None)
        processor, capability = (get_name(device) if get_name else processor_name()), ""
    return ComputePlatform(
        torch=str(torch.__version__),
        build=", ".join(build),
        machine=python_platform.machine(),
        device=device.type,
        processor=" ".join(processor.split()),
        capability=capability,
        instructions=instructions,
        settings=", ".join(f"{name}={value}" for name, value in environment.kernel_settings().items()),
        libraries=", ".join(filter(None, libraries)),
    )


def differences(there: Mapping[str, str], here: Mapping[str, str], when: tuple[str, str]) -> list[str]:
    """Return a text for each field of `here` that is different in `there`: `torch 2.12 then, 2.13 now`.

    `when` names the two in the texts. A field that `there` lacks is not known, and counts as equal. Of
    lists, only the entries that one of the two lacks are shown.
    """
    texts = []
    for name, value in here.items():
        if there.get(name, value) != value:
            mine, other = _items(value), _items(there[name])
            shown = [
                ", ".join(item for item in items if item not in without) or "none"
                for items, without in ((other, mine), (mine, other))
            ]
            texts.append(f"{name} {shown[0]} {when[0]}, {shown[1]} {when[1]}")
    return texts


def processor_name() -> str:
    """Return the CPU's name with family and model, because in virtual machines the name can be generic."""
    fields = _cpuinfo()
    if not fields:
        return python_platform.processor() or "unknown processor"
    name = fields.get("model name") or fields.get("CPU implementer", "unknown processor")
    numbers = [
        f"{label} {fields[key]}"
        for label, key in (("family", "cpu family"), ("model", "model"), ("part", "CPU part"))
        if key in fields
    ]
    return " ".join([name.replace('"', ""), *numbers])


def fast_instructions() -> str:
    """Name what this processor has for fast arithmetic: `AVX2, AVX-512, bf16, AMX`. Empty if not known."""
    flags = set(_processor_flags())
    return ", ".join(name for name, needed in _FAST.items() if flags & needed)


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply bf16 numbers. Otherwise they are emulated."""
    if device.type in ("cuda", "xpu"):
        has_it: bool = getattr(torch, device.type).is_bf16_supported(including_emulation=False)
        return has_it
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # torch's other kernels convert
        return False
    limit = environment.kernel_settings().get("ONEDNN_MAX_CPU_ISA", "")
    return "bf16" in fast_instructions() and not _WITHOUT_BF16.fullmatch(limit)


def _processor_flags() -> list[str]:
    fields = _cpuinfo()
    return (fields.get("flags") or fields.get("Features", "")).split()


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the fields of the first processor; empty if the system has no such file."""
    try:
        first = path.read_text().split("\n\n")[0]
    except OSError:
        return {}
    return dict(re.findall(r"^([^\t:]+)\s*: *(.*)$", first, re.MULTILINE))


def _nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        found = re.search(r"\b\d+\.\d[\d.]*", path.read_text())
    except OSError:
        return ""
    return f"driver {found[0]}" if found else ""


def _items(text: str) -> list[str]:
    return [item for item in text.split(", ") if item]
