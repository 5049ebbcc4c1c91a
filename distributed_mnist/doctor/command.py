"""`dmnist doctor`: one screen about a machine, or a job, that a person can paste into a bug report."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..distributed.membership import Peer
from ..distributed.world import World
from ..errors import VerificationError
from . import collectives, host
from .findings import Finding, good, merged, tried, worst

_MARKS = {"good": ("✓", "green"), "doubtful": ("!", "yellow"), "bad": ("✗", "bold red")}
_WIDE = 14
_OF_THE_HOST = ("processor", "memory")  # their figures change from moment to moment


def run(world: World, out: Path, dataset: str, data: Path, console: Console) -> dict[str, Any]:
    """Examine every host and what the ranks do together; what `--json` prints. All ranks call it.

    `conclude` says how it came out.
    """
    bound = [world.broadcast_object(host.affinity(), src=rank) for rank in range(world.size)]
    here = world.peers[world.rank].host
    own = [cores for peer, cores in zip(world.peers, bound, strict=True) if peer.host == here]
    mine = host.examine(world.peers, world.rank, world.local_size, len(set().union(*own)))
    everyone = [world.broadcast_object(mine, src=rank) for rank in range(world.size)]
    names = [f"rank {peer.rank} ({peer.host})" for peer in world.peers]
    findings = merged(list(zip(names, _once_a_host(world.peers, everyone), strict=True)))
    findings.append(_processes(world))
    figures: list[dict[str, float]] = []
    disk, found_data = world.on_rank_zero(
        lambda: (
            tried("checkpoints", lambda: host.disk(out), "choose another --out"),
            tried("data", lambda: host.data(dataset, data), "dmnist data check"),
        )
    )
    if world.size > 1:
        findings += [collectives.addresses(world)] if world.local_size < world.size else []
        findings.append(collectives.collectives(world))
        exchange, figures = collectives.speed(world)
        findings += [exchange, collectives.clocks(world)]
        findings += [_folders(world, out)] if disk.verdict != "bad" else []
    findings += [disk, found_data]
    if world.rank == 0:
        show(findings, console)
    return {
        "verdict": worst(findings),
        "world_size": world.size,
        "launcher": world.launcher,
        "backend": world.backend,
        "findings": [finding.to_dict() for finding in findings],
        "messages": figures,
    }


def conclude(result: dict[str, Any]) -> None:
    """Raise `VerificationError` if anything is bad."""
    count = sum(finding["verdict"] == "bad" for finding in result["findings"])
    if count:
        raise VerificationError(
            f"{count} line{'s' if count > 1 else ''} above marked ✗: training would fail"
        )


def show(findings: list[Finding], console: Console) -> None:
    """A line each, with what to do below it."""
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        label = Text.assemble((mark, style), " ", (f"{finding.name:<{_WIDE}}", "bold"))
        _print(console, label, Text(finding.value))
        if finding.advice:
            _print(console, Text(" " * (_WIDE + 2)), Text(f"→ {finding.advice}", style))
    console.print(
        Text("\ndmnist verify trains at several sizes and compares the answers: the full test", "dim")
    )


def _print(console: Console, label: Text, value: Text) -> None:
    """On a terminal wrapped at words, to the right of the label."""
    room = max(console.width - _WIDE - 2, 30)
    lines = value.wrap(console, room) if console.is_terminal else [value]
    for i, line in enumerate(lines):
        line.rstrip()
        console.print((label if i == 0 else Text(" " * (_WIDE + 2))) + line, soft_wrap=True)


def _once_a_host(peers: Sequence[Peer], everyone: Sequence[Sequence[Finding]]) -> list[list[Finding]]:
    """Findings by rank, where ranks of one host that looked a moment apart say the same."""
    first: dict[str, Sequence[Finding]] = {}
    for peer, findings in zip(peers, everyone, strict=True):
        first.setdefault(peer.host, findings)
    return [
        [
            theirs if own.name in _OF_THE_HOST else own
            for own, theirs in zip(findings, first[peer.host], strict=True)
        ]
        for peer, findings in zip(peers, everyone, strict=True)
    ]


def _processes(world: World) -> Finding:
    hosts = len({peer.host for peer in world.peers})
    if world.launcher == "spawned":
        return good("launcher", f"none; {world.size} processes of our own for what follows")
    if world.size == 1:
        return good("launcher", "none")
    where = f"{hosts} host{'s' if hosts > 1 else ''}"
    return good("launcher", f"{world.launcher}: {world.size} processes on {where}, {world.backend}")


def _folders(world: World, out: Path) -> Finding:
    """Whether the hosts see one folder for checkpoints. Either is fine; both are worth knowing."""

    def mark() -> str:
        handle, name = tempfile.mkstemp(prefix=".dmnist-doctor-", dir=host.nearest_folder(out))
        os.close(handle)
        return name

    name = world.on_rank_zero(mark)
    sees = tried("", lambda: good("", "yes" if Path(name).exists() else "no"), "").value == "yes"
    seen = world.all_gather(torch.tensor([int(sees)], device=world.device)).flatten().tolist()
    world.on_rank_zero(lambda: Path(name).unlink(missing_ok=True))
    without = {world.peers[rank].host for rank, sees in enumerate(seen) if not sees}
    if without:
        told = f"not seen by {', '.join(sorted(without))}: a copy of the checkpoints is kept on each"
        return good("shared folder", told)
    return good("shared folder", "all ranks see the same")
