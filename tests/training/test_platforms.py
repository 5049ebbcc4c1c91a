"""Ranks on unlike processors, or with unlike settings of the libraries, are told apart."""

import dataclasses

import torch
from ranks import run_ranks

from distributed_mnist.common.compute_platform import ComputePlatform, this_platform
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError
from distributed_mnist.training import platforms

NOTE = ": the last bits may depend on which rank computes what"
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


def compare(world: World) -> dict[str, str]:
    found = {
        f"{name} {sync}": told(world, {name: value}, [1], sync)
        for name, value in DIFFERENT.items()
        for sync in ("tree", "ddp")
    }
    return found | {
        "same": told(world, {}, [], "tree"),
        "two": told(world, {"settings": "A=1"}, [1, 2], "tree"),
        "zero": told(world, {"settings": "A=1"}, [0], "tree"),
        "processor": told(world, {"processor": "another", "libraries": "musl"}, [2], "tree"),
        "limits": told(world, {"settings": "MKL_CBWR=AVX2, ONEDNN_MAX_CPU_ISA=AVX2"}, [2], "tree"),
    }  # fmt: skip


def test_ranks_are_compared() -> None:
    said, *others = run_ranks(compare, 3)
    assert others == [said, said]  # so all ranks raise the same error, and rank 0 prints it
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
