"""Ranks on different kinds of device in one group, and ranks that share a device."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_device
import pytest
import torch
from ranks import DMNIST, Finished, WarmProgram, free_port, train

from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.peer import Peer, describe_devices, ranks_by_device
from distributed_mnist.distributed.process_group import choose_backend
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import LaunchError, UsageError
from distributed_mnist.verify.tree import command as verify_tree

needs_fake = pytest.mark.skipif(not fake_device.AVAILABLE, reason="torch is too old for a fake device")
EXACT = ["--recipe", "fast", "--model", "linear", "--steps", "2", "--precision", "exact"]


def peers(*kinds: str) -> list[Peer]:
    return [Peer(rank, "host", 100 + rank, device=kind) for rank, kind in enumerate(kinds)]


def test_the_devices_decide_what_carries_the_collectives() -> None:
    assert choose_backend(["cpu", "cpu"]) == choose_backend(["cpu"], "gloo") == "sockets"
    assert choose_backend(["cuda"] * 3) == "nccl"
    assert choose_backend(["cuda"] * 3, "gloo") == "gloo"
    assert choose_backend(["cuda", "cpu", "cuda"]) == choose_backend(["cuda", "xpu"], "nccl") == "sockets"
    assert (
        choose_backend(["cuda"] * 3, shared=True) == choose_backend(["mps"] * 2, shared=True) == "sockets"
    )
    with pytest.raises(LaunchError, match="MPS has one device and no collectives") as caught:
        choose_backend(["mps", "mps"])
    assert not caught.value.on_one_rank


def test_ranks_and_their_devices_in_words() -> None:
    assert describe_devices(peers("cuda", "cuda")) == "cuda"
    assert describe_devices(peers("cpu", "cuda", "cpu")) == "2 on cpu, 1 on cuda"
    assert ranks_by_device(peers("cpu", "cuda", "cpu")) == "rank 0, 2 on cpu, rank 1 on cuda"
    many = ranks_by_device(peers("cuda", *["cpu"] * 10))
    assert many == "rank 0 on cuda, rank 1, 2, 3, 4, 5, 6, 7, 8 and 2 more on cpu"


def test_a_rank_finishes_its_own_work_before_it_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its computing would count as waiting, for --balance and for the watchdog."""
    waited_for: list[str | None] = []
    world = World(ALONE, torch.device("cuda"), "sockets")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited_for.append(world.status.waiting))
    with world.communicating("an all-reduce"):
        assert world.status.waiting == "an all-reduce"
    assert waited_for == [None]
    with World(ALONE, torch.device("cuda"), "nccl").communicating("an all-reduce"):
        assert waited_for == [None]  # its collectives are queued too


def group(kinds: Sequence[str], *words: object) -> list[Finished]:
    """`dmnist WORDS` with one rank on each of these kinds of device."""
    port = str(free_port())
    variables = {"WORLD_SIZE": str(len(kinds)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with contextlib.ExitStack() as running:
        programs = [
            running.enter_context(
                WarmProgram(
                    (*DMNIST, *words),
                    fake_device.set_up if kind == "fake" else None,
                    cwd=None,
                    RANK=str(rank),
                    **variables,
                )
            )
            for rank, kind in enumerate(kinds)
        ]
        return [program.finish() for program in programs]


def trained(kinds: Sequence[str], digits: Path, out: Path, *words: object) -> dict[str, Any]:
    data = ["--dataset", "idx", "--data", digits, "--out", out]
    ended, *others = group(kinds, "train", *words, *data, "--json")
    assert {other.code for other in others} <= {0}, others
    return ended.json()


@needs_fake
def test_a_mixed_group_computes_what_one_process_does(digits: Path, tmp_path: Path) -> None:
    alone = train(*EXACT, "--dataset", "idx", "--data", digits, nproc=1, out=tmp_path / "alone")
    mixed = trained(["cpu", "fake", "cpu"], digits, tmp_path / "mixed", *EXACT, "--balance", "auto")
    assert mixed["device"] == "2 on cpu, 1 on fake"
    for name in ("weights_sha256", "samples_sha256", "test_loss"):
        assert mixed[name] == alone[name]
    start = json.loads((tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["lines"]["world"] == "3 processes (environment, sockets): 2 on cpu, 1 on fake"
    assert [rank["device"] for rank in start["ranks"]] == ["cpu", "fake", "cpu"]


@needs_fake
def test_in_another_precision_it_is_refused(digits: Path, tmp_path: Path) -> None:
    words = ["train", "--dataset", "idx", "--data", digits, "--out", tmp_path / "out", "--steps", "2"]
    ended, other = group(["cpu", "fake"], *words)
    assert (ended.code, other.code, other.stderr) == (2, 2, "")
    assert ended.stderr.splitlines()[-1] == (
        "dmnist: rank 0 on cpu, rank 1 on fake: different kinds of device give different last bits; "
        "add --precision exact, where they do not, or --device cpu"
    )
    assert not (tmp_path / "out").exists()


def test_the_known_answer_with_tree_needs_one_kind_of_device() -> None:
    world: Any = SimpleNamespace(peers=peers("cpu", "cuda"))
    nothing: Any = None
    with pytest.raises(UsageError, match=r"rank 0 on cpu, rank 1 on cuda: .*; leave out --sync tree, "):
        verify_tree.run(world, nothing, nothing)


@needs_fake
def test_the_doctor_examines_a_mixed_group() -> None:
    ended, _ = group(["cpu", "fake"], "doctor", "--dataset", "generated", "--json")
    found = {finding["name"]: finding["value"] for finding in json.loads(ended.stdout)["findings"]}
    assert found["launcher"].endswith("sockets; 1 on cpu, 1 on fake")
    assert " right over sockets: " in found["collectives"]


@needs_fake
def test_two_ranks_on_one_device(digits: Path, tmp_path: Path) -> None:
    data = ["--dataset", "idx", "--data", digits, "--json"]

    def ended(name: str, nproc: int, *words: str) -> Finished:
        command = (*DMNIST, "train", *words, *data, "--nproc", nproc, "--out", tmp_path / name)
        with WarmProgram(command, fake_device.set_up) as program:
            return program.finish()

    alone = train(*EXACT, "--dataset", "idx", "--data", digits, nproc=1, out=tmp_path / "alone")
    shared = ended("shared", 2, *EXACT, "--oversubscribe").json()
    assert shared["device"] == "fake"
    assert shared["weights_sha256"] == alone["weights_sha256"]
    tree = [*EXACT[:-1], "fp32"]
    weights = [ended(f"tree-{n}", n, *tree, "--oversubscribe").json()["weights_sha256"] for n in (1, 2)]
    assert weights[0] == weights[1] != alone["weights_sha256"]
    refused = ended("refused", 2, *EXACT)
    assert refused.code == 5
    assert "start at most 1, or let them share it with dmnist train --oversubscribe" in refused.stderr
