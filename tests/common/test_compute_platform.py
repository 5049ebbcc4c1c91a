"""The platform of a process: what chooses its kernels, and how two of them differ."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from distributed_mnist.common import compute_platform, environment
from distributed_mnist.common.compute_platform import ComputePlatform, differences, this_platform

CPU = this_platform(torch.device("cpu"))
X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) "Gold"
flags\t\t: fpu sse4_1 avx avx2 smep avx512f amx_tile

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def cpuinfo(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None) -> ComputePlatform:
    path = folder / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(compute_platform._cpuinfo, "__defaults__", (path,))
    return this_platform(torch.device("cpu"))


def test_this_host() -> None:
    assert CPU.torch == torch.__version__
    assert CPU.build == torch.version.git_version[:10]
    assert CPU.capability == torch.backends.cpu.get_cpu_capability()
    assert CPU.processor == " ".join(CPU.processor.split()) != ""


def test_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x86 = cpuinfo(monkeypatch, tmp_path, X86)
    assert x86.processor == "Intel(R) Xeon(R) Gold family 6 model 85"
    assert x86.instructions == "amx_tile, avx, avx2, avx512f, sse4_1"
    assert compute_platform.fast_instructions() == "AVX2, AVX-512, AMX"
    assert not compute_platform.multiplies_bf16(torch.device("cpu"))
    arm = cpuinfo(monkeypatch, tmp_path, ARM)
    assert (arm.processor, arm.instructions) == ("0x41 part 0xd40", "asimd, asimddp, sve")
    assert compute_platform.fast_instructions() == "SVE"


@pytest.mark.parametrize(
    ("flags", "limit", "has_it"),
    [
        ("avx2 avx512f avx512_bf16", None, True),
        ("avx2 avx512f avx512_bf16", "AVX512_CORE", False),
        ("avx2 avx512f avx512_bf16", "avx2", False),
        ("avx2 avx512f avx512_bf16", "AVX512_CORE_BF16", True),
        ("avx2 avx512f avx512_bf16", "DEFAULT", True),
        ("avx2 avx512f amx_bf16 amx_tile", "AVX512_CORE_AMX", True),
        ("avx2 avx512f avx512_bf16", "", True),
        ("avx2 avx512f avx512_bf16", "unknown", True),  # oneDNN ignores it
        ("avx2 avx512f avx512_bf16", "AVX512_CORE_VNNI", False),
        ("avx2 avx512f", None, False),
        ("avx2", None, False),
    ],
)
def test_bf16_in_hardware(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, limit: str | None, has_it: bool
) -> None:
    cpuinfo(monkeypatch, tmp_path, f"flags\t\t: {flags}\n")
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert compute_platform.multiplies_bf16(torch.device("cpu")) == has_it
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not compute_platform.multiplies_bf16(torch.device("cpu"))


def test_bf16_on_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for features, has_it in (
        ("asimd sve i8mm bf16", True),
        ("asimd sve i8mm svebf16", True),
        ("asimd", False),
    ):
        cpuinfo(monkeypatch, tmp_path, f"Features\t: {features}\n")
        assert compute_platform.multiplies_bf16(torch.device("cpu")) is has_it


def test_bf16_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has it from compute capability 8.0."""
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, has_it in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        properties = type("Properties", (), {"major": capability[0]})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert compute_platform.multiplies_bf16(torch.device("cuda")) is has_it
    for has_it in (False, True):
        properties = type("Properties", (), {"has_bfloat16_conversions": has_it})
        monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda p=properties: p)
        assert compute_platform.multiplies_bf16(torch.device("xpu")) is has_it
    assert not compute_platform.multiplies_bf16(torch.device("mps"))


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without = cpuinfo(monkeypatch, tmp_path, None)
    assert without.processor
    assert without.instructions == compute_platform.fast_instructions() == ""


def test_only_variables_that_choose_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if environment._KERNEL_VARIABLES.fullmatch(name):
            monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_VERBOSE", "NCCL_DEBUG", "MKL_VERBOSE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the program sets it
    assert this_platform(torch.device("cpu")).settings == ""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert this_platform(torch.device("cpu")).settings == "MKL_CBWR=COMPATIBLE, ONEDNN_MAX_CPU_ISA=AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # oneDNN reads this one first
    assert environment.kernel_settings()["ONEDNN_MAX_CPU_ISA"] == "SSE41"


def test_limits_make_processors_alike() -> None:
    """With limits for oneDNN and MKL, an older processor can join a newer one."""
    for settings, alike in (
        ("", False),
        ("ONEDNN_MAX_CPU_ISA=AVX2", False),
        ("MKL_CBWR=AVX2, ONEDNN_MAX_CPU_ISA=AVX2", True),
    ):
        here, there = (
            dataclasses.replace(CPU, settings=settings, instructions=instructions)
            for instructions in ("avx, avx2", "avx, avx2, avx512f")
        )
        assert (here.kernels() == there.kernels()) is alike


def test_a_gpu_counts_and_not_the_processor_beside_it() -> None:
    gpu = dataclasses.replace(CPU, device="cuda", processor="NVIDIA H100", capability="9.0")
    assert gpu.kernels() == dataclasses.replace(gpu, instructions="sve").kernels()
    assert gpu.kernels() != dataclasses.replace(gpu, processor="NVIDIA H200").kernels()
    assert CPU.kernels() == dataclasses.replace(CPU, processor="another", libraries="musl").kernels()


def test_the_driver_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert compute_platform._nvidia_driver(path) == ""
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build", "570.86.10"),
    ):
        path.write_text(f"{text}\nGCC version:  gcc version 12.2.0\n")
        assert compute_platform._nvidia_driver(path) == f"driver {version}"


@pytest.mark.parametrize("name", ["torch", "build", "machine", "device", "capability", "settings"])
def test_each_of_these_decides(name: str) -> None:
    assert dataclasses.replace(CPU, **{name: "x"}).kernels() != CPU.kernels()


def test_differences() -> None:
    then = {"torch": "2.12", "instructions": "avx, avx2", "settings": "", "extra": "x"}
    now = {"torch": "2.13", "instructions": "avx, sve", "settings": "A=1", "python": "3.11"}
    assert differences(then, now, ("then", "now")) == [
        "torch 2.12 then, 2.13 now",
        "instructions avx2 then, sve now",
        "settings none then, A=1 now",
    ]
    assert differences(then, then, ("then", "now")) == []
