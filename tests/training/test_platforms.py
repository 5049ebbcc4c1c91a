"""Ranks on unlike processors, or with unlike settings of the libraries, are told apart."""

import dataclasses
import io
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import pytest
import torch
from ranks import run_ranks

from distributed_mnist.api import functions
from distributed_mnist.common.compute_platform import ComputePlatform, this_platform
from distributed_mnist.common.placement import ALONE, Placement
from distributed_mnist.config import Recipe, Run
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError
from distributed_mnist.runs.checkpoint import encode
from distributed_mnist.runs.run_folder import open_folder
from distributed_mnist.training import platforms, preparation
from distributed_mnist.training.resume import with_kept_precision

NOTE = ": the last bits may depend on which rank computes what"
AUTO = Recipe(precision="auto")
DIFFERENT = {
    "torch": "2.9.0",
    "build": "0123456789",
    "capability": "DEFAULT",
    "settings": "ONEDNN_MAX_CPU_ISA=SSE41",
    "instructions": "sse4_1",
}


def told(world: World, changes: dict[str, str], ranks: list[int], sync: str) -> str:
    """What `require_same_platform` says if these fields are different on these ranks."""

    def platform(device: torch.device) -> ComputePlatform:
        same = dataclasses.replace(
            this_platform(device), settings="", instructions="avx", capability="AVX2"
        )
        return dataclasses.replace(same, **changes) if world.rank in ranks else same

    platforms.this_platform = platform
    try:
        return " | ".join(platforms.require_same_platform(world, sync))  # type: ignore[arg-type]
    except UsageError as error:
        return f"refused: {error}"


def precision_with(world: World, ranks: Collection[int]) -> str:
    """The precision of a recipe that leaves it open, if these ranks have bf16 in hardware."""
    platforms.multiplies_bf16 = lambda device: world.rank in ranks
    return platforms.agree_on_platform(world, AUTO)[0].precision


def save(folder: Path, precision: str) -> Path:
    """Write a checkpoint of a run in this precision."""
    path = folder / "checkpoints" / "step_00000001.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode({**fuzz.content(), "recipe": AUTO.replace(precision=precision).to_dict()}))
    return path


def compare(world: World, folder: Path) -> dict[str, Any]:
    mine = folder / str(world.rank)
    if world.rank == 1:  # as after rank 0 has moved to another host
        save(mine, "bf16")
    found: dict[str, Any] = {
        f"{name} {sync}": told(world, {name: value}, [1], sync)
        for name, value in DIFFERENT.items()
        for sync in ("tree", "ddp")
    }
    return found | {
        "same": told(world, {}, [], "tree"),
        "two": told(world, {"settings": "A=1"}, [1, 2], "tree"),
        "zero": told(world, {"settings": "A=1"}, [0], "tree"),
        "processor": told(world, {"processor": "another", "libraries": "musl"}, [2], "tree"),
        "precisions": [precision_with(world, ranks) for ranks in ((), (1,), (0, 1, 2))],
        "kept": with_kept_precision(world, AUTO, Run(out=mine, resume="auto"), None).precision,
        "limits": told(world, {"settings": "MKL_CBWR=AVX2, ONEDNN_MAX_CPU_ISA=AVX2"}, [2], "tree"),
    }  # fmt: skip


def test_ranks_are_compared(tmp_path: Path) -> None:
    said, *others = run_ranks(compare, 3, tmp_path)
    assert others == [said, said]  # so all ranks raise the same error, and rank 0 prints it
    assert said["precisions"] == ["fp32", "fp32", "bf16"]
    assert said["kept"] == "bf16"
    for name, value in DIFFERENT.items():
        assert said[f"{name} tree"].startswith("refused: rank 1 (pid ")
        assert f" does not compute like rank 0 ({name} {value} there, " in said[f"{name} tree"]
        assert said[f"{name} ddp"].endswith(NOTE)
    assert said["same"] == ""
    assert " and 1 more does not compute like rank 0 (settings A=1 there, none on rank 0)" in said["two"]
    assert "(settings none there, A=1 on rank 0)" in said["zero"]
    assert said["processor"].startswith("rank 2 (pid ")
    assert "processor another there, " in said["processor"]
    assert said["processor"].endswith(NOTE)
    assert "instructions only on one of them" in said["limits"]


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_hardware_chooses_the_precision(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "multiplies_bf16", lambda device: has_bf16)
    world, bf16 = World(ALONE, torch.device("cpu"), "none"), Recipe(precision="bf16")
    chosen = "bf16" if has_bf16 else "fp32"
    assert platforms.agree_on_platform(world, AUTO) == (AUTO.replace(precision=chosen), [])
    slow = ["this hardware emulates bf16: a new run with --precision fp32 would be faster"]
    assert platforms.agree_on_platform(world, bf16) == (bf16, [] if has_bf16 else slow)


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_precision(kept: str, tmp_path: Path) -> None:
    world, out = World(ALONE, torch.device("cpu"), "none"), tmp_path / "run"
    assert with_kept_precision(world, AUTO, Run(out=out, resume="auto"), None) is AUTO
    path = save(out, kept)
    assert with_kept_precision(world, AUTO, Run(out=out), None) is AUTO  # a new run
    assert with_kept_precision(world, AUTO, Run(out=out, resume="auto"), None).precision == kept
    raw = path.read_bytes()
    assert with_kept_precision(world, AUTO, Run(resume="it.pt"), raw).precision == kept
    early = {name: value for name, value in AUTO.to_dict().items() if name != "precision"}
    raw = encode({**fuzz.content(), "recipe": early})  # of a version that had none
    assert with_kept_precision(world, AUTO, Run(resume="it.pt"), raw).precision == "fp32"
    buffer = io.BytesIO()
    weights = {"module.fc.weight": torch.zeros(10, 784), "module.fc.bias": torch.zeros(10)}
    torch.save({"epoch": 1, "state_dict": weights, "best_acc": 0.5, "optimizer": {}}, buffer)
    original = buffer.getvalue()  # of the original script, which has no recipe: it is refused later
    assert with_kept_precision(world, AUTO, Run(resume="it.pt"), original) is AUTO


@pytest.mark.parametrize("out", [None, Path("here")])
def test_a_restart_keeps_the_precision(
    out: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may restart a run on other hardware, without `--resume`."""
    monkeypatch.chdir(tmp_path)
    world, options = World(Placement(launcher_id="mine"), torch.device("cpu"), "none"), Run(out=out)
    assert with_kept_precision(world, AUTO, options, None) is AUTO
    folder = open_folder(world, options, AUTO, "fast")
    assert folder.lock is not None
    folder.lock.release()
    assert with_kept_precision(world, AUTO, options, None) is AUTO  # nothing was saved
    save(folder.path, "fp32")
    assert with_kept_precision(world, AUTO, options, None).precision == "fp32"


def test_exact_needs_float64() -> None:
    world = World(ALONE, torch.device("mps"), "none")
    with pytest.raises(UsageError, match="needs float64, which MPS does not have: add --device cpu"):
        platforms.agree_on_platform(world, Recipe(precision="exact"))


def test_mps_is_refused_on_all_ranks_of_a_mixed_group() -> None:
    world = World(ALONE, torch.device("cpu"), "none")
    world.peers = [Peer(0, "host", 1), Peer(1, "host", 2, device="mps")]
    with pytest.raises(UsageError, match="MPS does not have"):
        platforms.agree_on_platform(world, Recipe(precision="exact"))


def settings_of_a_run_as_on_a_gpu(world: World, options: dict[str, Any]) -> list[Any]:
    """Train on the CPU with the settings used on a GPU. Return them, and those after the run."""
    compiler = (
        "torch._dynamo",
        "torch._inductor",
        "torch.fx.experimental.symbolic_shapes",
        "sympy",
        "triton",
    )
    for name in {*compiler, *(name for name in sys.modules if name.startswith(compiler))}:
        sys.modules[name] = None  # type: ignore[assignment] # an import of it fails
    use_threads, found = preparation.use_threads, list[Any]()

    def settings() -> list[Any]:
        return [
            torch.get_deterministic_debug_mode(),
            torch._C._get_deterministic_fill_uninitialized_memory(),
        ]

    def as_on_a_gpu(_: World, recipe: Recipe) -> int:
        gpu: Any = SimpleNamespace(device=torch.device("cuda"), local_size=1)
        return use_threads(gpu, recipe)

    preparation.use_threads = as_on_a_gpu
    options |= {"dataset": "generated", "train_size": 16, "test_size": 16, "device": "cpu"}
    functions.train("fast", epochs=1, batch_size=16, on_event=lambda _: found.append(settings()), **options)
    return [found[-1], settings()]


@pytest.mark.parametrize(
    ("options", "deterministic"),
    [({"sync": "tree"}, [1, False]), ({"sync": "ddp"}, [0, True]), ({"precision": "exact"}, [0, True])],
)
def test_a_run_does_not_import_the_compiler_of_torch(
    options: dict[str, Any], deterministic: list[Any], tmp_path: Path
) -> None:
    """It takes seconds, and `torch.use_deterministic_algorithms` imports it."""
    (found,) = run_ranks(settings_of_a_run_as_on_a_gpu, 1, options | {"out": tmp_path / "run"})
    assert found == [deterministic, [0, True]]
