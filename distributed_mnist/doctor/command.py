"""Run `dmnist doctor`: one screen about a machine or a job, short enough to paste into a bug report."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..distributed.peer import Peer, describe_devices
from ..distributed.world import World
from ..errors import VerificationError
from ..reporting.console import print_labelled
from . import collectives, host
from .findings import Finding, good, merge, run_probe, worst

_MARKS = {"good": ("✓", "green"), "doubtful": ("!", "yellow"), "bad": ("✗", "bold red")}
_NAME_WIDTH = 14
_SAME_ON_A_HOST = ("processor", "memory")  # the figures of these findings change from moment to moment


def run(world: World, out: Path, dataset: str, data: Path, console: Console) -> dict[str, Any]:
    """Examine every host and the communication between ranks, and return what `--json` prints.

    All ranks must call it. Rank 0 shows the findings. `conclude` raises an error if any of them is bad.
    """
    cores_by_rank = world.all_gather_object(host.affinity(), set[int])
    own_host = world.peers[world.rank].host
    host_cores = set[int]()
    for peer, cores in zip(world.peers, cores_by_rank, strict=True):
        if peer.host == own_host:
            host_cores |= cores
    own = host.examine(world.peers, world.rank, world.local_size, len(host_cores))
    by_rank = world.all_gather_object(own, list[Finding])
    names = [f"rank {peer.rank} ({peer.host})" for peer in world.peers]
    findings = merge(list(zip(names, _same_figures_on_a_host(world.peers, by_rank), strict=True)))
    findings.append(_launcher(world).named("launcher"))
    message_times: list[dict[str, float]] = []
    disk, data_finding = world.on_rank_zero(
        lambda: (
            run_probe("checkpoints", lambda: host.disk(out), "choose another --out"),
            run_probe("data", lambda: host.data(dataset, data), "dmnist data check"),
        ),
        tuple[Finding, Finding],
    )
    if world.size > 1:
        if world.local_size < world.size:
            findings.append(collectives.addresses(world).named("addresses"))
        findings.append(collectives.collectives(world).named("collectives"))
        exchange, message_times = collectives.speed(world)
        findings += [exchange.named("exchange"), collectives.clocks(world).named("clocks")]
        if disk.verdict != "bad":
            findings.append(_shared_folder(world, out).named("shared folder"))
    findings += [disk, data_finding]
    if world.rank == 0:
        show(findings, console)
    return {
        "verdict": worst(findings),
        "world_size": world.size,
        "launcher": world.launcher,
        "backend": world.backend,
        "findings": [asdict(finding) for finding in findings],
        "messages": message_times,
    }


def conclude(result: dict[str, Any]) -> None:
    """Raise `VerificationError` if any finding is bad."""
    count = sum(finding["verdict"] == "bad" for finding in result["findings"])
    if count:
        raise VerificationError(
            f"{count} line{'s' if count > 1 else ''} above marked ✗: training would fail"
        )


def show(findings: list[Finding], console: Console) -> None:
    """Print one line for each finding, with the advice below it."""
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        label = Text.assemble((mark, style), " ", (f"{finding.name:<{_NAME_WIDTH}}", "bold"))
        print_labelled(console, label, Text(finding.value), _NAME_WIDTH + 2)
        if finding.advice:
            label, advice = Text(" " * (_NAME_WIDTH + 2)), Text(f"→ {finding.advice}", style)
            print_labelled(console, label, advice, _NAME_WIDTH + 2)
    console.print(
        Text(
            "\nthe full test is dmnist verify: it trains, and its answer is known for every machine", "dim"
        )
    )


def _same_figures_on_a_host(
    peers: Sequence[Peer], by_rank: Sequence[Sequence[Finding]]
) -> list[list[Finding]]:
    """Return the findings by rank, with the figures of a host's first rank for all ranks of that host.

    The ranks look at slightly different moments, so otherwise each would get its own line.
    """
    first_on_host: dict[str, Sequence[Finding]] = {}
    for peer, findings in zip(peers, by_rank, strict=True):
        first_on_host.setdefault(peer.host, findings)
    return [
        [
            first if own.name in _SAME_ON_A_HOST else own
            for own, first in zip(findings, first_on_host[peer.host], strict=True)
        ]
        for peer, findings in zip(peers, by_rank, strict=True)
    ]


def _launcher(world: World) -> Finding:
    hosts = len({peer.host for peer in world.peers})
    if world.launcher == "spawned":
        return good(f"none; this command started {world.size} processes for the checks below")
    if world.size == 1:
        return good("none")
    where = f"{hosts} host{'s' if hosts > 1 else ''}"
    processes = f"{world.size} processes on {where}"
    return good(f"{world.launcher}: {processes}, {world.backend}; {describe_devices(world.peers)}")


def _shared_folder(world: World, out: Path) -> Finding:
    """Find out whether all hosts see the same folder for checkpoints. Both answers are good."""

    def create_file() -> str:
        handle, name = tempfile.mkstemp(prefix=".dmnist-doctor-", dir=host.nearest_folder(out))
        os.close(handle)
        return name

    name = world.on_rank_zero(create_file, str)
    sees = run_probe("", lambda: good("yes" if Path(name).exists() else "no"), "").value == "yes"
    seen_by_rank = world.all_gather(torch.tensor([int(sees)], device=world.device)).flatten().tolist()
    world.on_rank_zero(lambda: Path(name).unlink(missing_ok=True), NoneType)
    blind_hosts = {world.peers[rank].host for rank, seen in enumerate(seen_by_rank) if not seen}
    if blind_hosts:
        hosts = ", ".join(sorted(blind_hosts))
        return good(f"not seen by {hosts}: each of them keeps a copy of the checkpoints")
    return good("all ranks see the same")
