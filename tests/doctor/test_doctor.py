"""Test `dmnist doctor`: its screen, the problems that it finds, and that it catches a wrong collective."""

import json
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import DMNIST, PATIENCE, TORCHRUN, dmnist, run_ranks
from torchrun_agents import WarmAgent

from distributed_mnist.common import environment
from distributed_mnist.common.compute_platform import fast_instructions
from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.distributed.world import World
from distributed_mnist.doctor import collectives
from distributed_mnist.doctor import command as doctor
from distributed_mnist.doctor import host as probe_host
from distributed_mnist.doctor.findings import Finding, bad, doubtful, good, merge, run_probe, worst
from distributed_mnist.errors import LaunchError

NAMES = ["versions", "processor", "threads", "settings", "memory", "devices", "open files", "host name"]
NAMES += ["launcher"]
COLLECTIVE_NAMES = ["collectives", "exchange", "clocks", "shared folder"]
FOLDER_NAMES = ["checkpoints", "data"]


def doctor_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    ended = dmnist("doctor", *arguments, "--device", "cpu", "--json")
    assert ended.code == code, ended
    return json.loads(ended.stdout)


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in result["findings"]}


@pytest.mark.parametrize("nproc", [1, 3])
def test_alone(nproc: int, digits: Path, tmp_path: Path) -> None:
    result = doctor_json("--nproc", nproc, "--dataset", "generated", "--out", tmp_path)
    names = list(by_name(result))
    assert names == [*NAMES, *(COLLECTIVE_NAMES if nproc > 1 else []), *FOLDER_NAMES]
    assert result["verdict"] in ("good", "doubtful")
    assert result["world_size"] == nproc
    for finding in result["findings"]:
        assert (finding["advice"] == "") == (finding["verdict"] == "good")
    if nproc > 1:
        assert "9 right over sockets" in by_name(result)["collectives"]["value"]
        assert all(row["seconds"] > 0 for row in result["messages"])


def test_under_torchrun(tmp_path: Path) -> None:
    words = ("doctor", "--device", "cpu", "--dataset", "generated", "--out", tmp_path)
    with WarmAgent((*TORCHRUN, "--standalone", "--nproc-per-node", 3, *DMNIST, *words)) as agent:
        ended = agent.finish()
    assert ended.code == 0, ended
    assert ended.stdout.count("collectives") == 1  # one screen for all
    assert "torchrun: 3 processes on 1 host, sockets" in ended.stdout


def test_problems_come_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = doctor_json("--nproc", "1", "--data", tmp_path / "none", "--out", tmp_path / "later" / "runs")
    data = by_name(result)["data"]
    assert data["verdict"] == "doubtful"
    assert "dmnist data fetch mnist" in data["advice"]
    assert by_name(result)["checkpoints"]["value"].startswith(str(tmp_path))  # the nearest folder


def test_damaged_data_is_bad(tmp_path: Path) -> None:
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0\10\1\0\0\0\5abc")
    ended = dmnist("doctor", "--nproc", "1", "--device", "cpu", "--data", tmp_path)
    assert ended.code == 9
    assert "✗ data" in ended.stdout
    assert "1 line above marked ✗" in ended.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe_host.os, "fsync", full)
    finding = probe_host.disk(tmp_path)
    assert finding.verdict == "bad"
    assert finding.value == f"{tmp_path}: no space left on device"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    assert probe_host.disk(tmp_path).verdict == "doubtful"
    monkeypatch.undo()

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(probe_host.fcntl, "flock", no_locks)
    finding = probe_host.disk(tmp_path)
    assert finding.verdict == "doubtful"
    assert finding.value.endswith("; no locks")


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for out in (tmp_path / "runs", tmp_path / "runs" / "mine"):
        finding = probe_host.disk(out)
        assert finding.verdict == "bad"
        assert finding.value == f"{out}: a file, not a folder"


def test_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_host._memory_limit(tmp_path) is None
    (tmp_path / "memory.current").write_text(f"{2**30 + 5}\n")
    (tmp_path / "memory.stat").write_text("file 9\ninactive_file 5\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert probe_host._memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{3 * 2**29}\n")
    assert probe_host._memory_limit(tmp_path) == (3 * 2**29, 2**30)
    monkeypatch.setattr(probe_host, "_memory_limit", lambda: (3 * 2**29, 2**30))
    finding = probe_host._memory()
    assert finding.verdict == "doubtful"
    assert finding.value.startswith("0.5 of ")
    assert "(the container's limit is 1.5)" in finding.value


def test_ranks_bound_to_a_core_each_do_not_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(probe_host, "affinity", lambda: {5})
    monkeypatch.setattr(probe_host, "usable_cores", lambda: 1)
    assert probe_host._processor(2, 2).verdict == "good"
    assert (fast_instructions() or torch.backends.cpu.get_cpu_capability()) in probe_host._processor(
        2, 2
    ).value
    assert probe_host._processor(2, 1).verdict == "doubtful"
    monkeypatch.setattr(probe_host, "affinity", lambda: {4, 5, 6})  # and a quota of one core for all
    assert probe_host._processor(2, 3).verdict == "doubtful"


def test_ranks_of_one_host_that_look_a_moment_apart_get_one_line() -> None:
    peers = [Peer(rank, host, 1) for rank, host in enumerate(("a", "a", "b"))]
    by_rank = [
        [good(f"{rank} GiB").named("memory"), good(str(rank)).named("versions")] for rank in range(3)
    ]
    shown = doctor._same_figures_on_a_host(peers, by_rank)
    assert [[line.value for line in lines] for lines in shown] == [
        ["0 GiB", "0"],
        ["0 GiB", "1"],
        ["2 GiB", "2"],
    ]


def without_process_group(world: World) -> Finding:
    def refuse() -> None:
        raise LaunchError("cannot join the process group: no route to host")

    world.join_process_group = refuse  # type: ignore[method-assign, assignment]
    return collectives.collectives(world)


def test_a_process_group_that_cannot_be_joined_is_a_finding() -> None:
    for finding in run_ranks(without_process_group, 2):
        assert finding.verdict == "bad"
        assert finding.value == "wrong: ddp (cannot join the process group: no route to host) on rank 0, 1"


def test_names_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"here": "127.0.1.1", "there": "10.0.0.2"}

    def lookup(name: str, _: None) -> list[Any]:
        if name not in addresses:
            raise OSError(name)
        return [(0, 0, 0, "", (addresses[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    here, there, lost = (Peer(rank, host, 1) for rank, host in enumerate(("here", "there", "lost")))
    assert probe_host._name([here, there], 0).verdict == "doubtful"  # the classic trap
    assert "127.0.1.1" in probe_host._name([here, there], 0).value
    assert probe_host._name([here, there], 1).verdict == "good"
    assert probe_host._name([here, lost], 1).value == "lost cannot be resolved"
    assert probe_host._name([here], 0).verdict == "good"


def with_wrong_collective(world: World, name: str) -> Finding:
    """Make one collective give a wrong result on rank 1."""
    right = getattr(world, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        answer = right(*arguments, **options)
        if (
            world.rank == 1
            and isinstance(answer, torch.Tensor)
            and answer.dtype == torch.int64
            and answer.numel() >= 300
        ):
            answer.view(-1)[-1] += 1
        return answer

    setattr(world, name, wrong)
    return collectives.collectives(world)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("all_reduce_sum_", "sum"),
        ("all_reduce_max_", "maximum"),
        ("all_to_all", "exchange"),
        ("broadcast_", "broadcast"),
    ],
)
def test_a_wrong_collective_is_found(name: str, check: str) -> None:
    findings = run_ranks(with_wrong_collective, 3, name)
    assert findings[0] == findings[1] == findings[2]
    assert findings[0].verdict == "bad"
    assert findings[0].value == f"wrong: {check} on rank 1"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_collectives_are_right(size: int) -> None:
    for finding in run_ranks(collectives.collectives, size):
        assert finding.verdict == "good", finding


def test_clocks_of_a_single_process() -> None:
    world = World(ALONE, torch.device("cpu"), "none")
    assert collectives.clocks(world).verdict == "good"


def test_lines_of_several_ranks() -> None:
    same, other = good("much"), doubtful("little", "buy some")
    assert merge([("a", [same]), ("b", [same])]) == [same]
    assert [line.value for line in merge([("a", [same]), ("b", [other]), ("c", [same])])] == [
        "a, c: much",
        "b: little",
    ]
    assert worst([]) == "good"
    assert worst([same, other, bad("", ""), same]) == "bad"

    def broken() -> Finding:
        raise KeyError("no")

    assert run_probe("it", broken, "mend it") == bad("KeyError: 'no'", "mend it").named("it")


def test_a_probe_that_does_not_return_is_a_finding() -> None:
    """A call to a file system whose server is gone never returns."""
    released = threading.Event()

    def stuck() -> Finding:
        released.wait(PATIENCE)
        return same

    same = good("at last")
    finding = run_probe("it", stuck, "mend it", seconds=0.05)
    assert finding == bad("no answer within 0.05 s", "mend it").named("it")
    released.set()


def test_accelerators_without_name_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Apple:
        """Like `torch.mps`: no names and no memory."""

    class Other(Apple):
        def get_device_name(self, index: int) -> str:
            return f"Card {index // 2}"

        def get_device_properties(self, index: int) -> Any:
            return SimpleNamespace(total_memory=80 * 2**30)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: Apple())
    assert probe_host._devices().value.startswith("cuda: 2 × unnamed device")  # noqa: RUF001
    monkeypatch.setattr(torch, "get_device_module", lambda _: Other())
    assert "2 × Card 0 (80 GiB)" in probe_host._devices().value  # noqa: RUF001


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.settings():
        monkeypatch.delenv(name)
    assert probe_host._settings().value == "none for torch, OpenMP, MKL, NCCL or gloo"
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HOME_NCCL", "secret")
    assert probe_host._settings().value == "NCCL_DEBUG=INFO, OMP_NUM_THREADS=7"
