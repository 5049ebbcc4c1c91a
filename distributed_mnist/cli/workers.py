"""What one process of a group does for a command: join, work, print what only one should print.

Named by the launcher as `module:function`, so that the process that starts others need not import torch.
"""

import socket
from collections.abc import Callable
from functools import partial

import torch

from ..common.placement import Placement
from ..data import prefetch
from ..data.datasets import Dataset
from ..data.prefetch import PrefetchedData
from ..distributed.world import World
from ..doctor import command as examine
from ..inference import ensemble, score
from ..launcher.rank_process import run_in_group
from ..launcher.signals import StopSignals
from ..reporting.console import make_console, print_json
from ..runs.layout import resume_flags
from ..training import run
from ..verify import under_launcher
from ..verify.results_table import ResultsTable
from .flags_train import Train, Verify
from .flags_use import Doctor, Evaluate


def train(
    placement: Placement,
    listener: socket.socket | None,
    command: Train,
    handed: PrefetchedData | None = None,
) -> int:
    """One rank of `dmnist train`; its exit code. `handed` is the data, where our launcher reads it."""

    def body(world: World, signals: StopSignals) -> None:
        result = run.run(
            world,
            command.settings,
            command.run,
            title=command.recipe,
            console=make_console(stderr=command.json),
            signals=signals,
            read=_reader(command, handed),
            tensorboard=command.tensorboard,
            resume_flags=resume_flags(command.run.out.parent, command.ensemble)
            if command.ensemble > 1 and command.run.out
            else None,
        )
        if command.json and world.rank == 0 and command.ensemble == 1:
            print_json(result)

    exact = command.settings.sync == "tree"
    return run_in_group(
        placement,
        listener,
        body,
        device=command.run.device,
        exact=exact,
        hang_after=command.run.hang_after,
        debug=command.debug,
    )


def vote(
    placement: Placement,
    listener: socket.socket | None,
    command: Train,
    handed: PrefetchedData | None = None,
) -> int:
    """One rank of what follows the training of an ensemble; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        assert command.run.out is not None  # the launcher has chosen it
        result = ensemble.run(
            world,
            command.settings,
            command.run.out,
            command.ensemble,
            console=make_console(stderr=command.json),
            read=_reader(command, handed),
        )
        if command.json and world.rank == 0:
            print_json(result)

    return run_in_group(
        placement,
        listener,
        body,
        device=command.run.device,
        hang_after=command.run.hang_after,
        debug=command.debug,
    )


def _reader(command: Train, handed: PrefetchedData | None) -> Callable[[], Dataset]:
    return (
        handed.receive if handed else partial(prefetch.read, command.run, make_console(stderr=command.json))
    )


def evaluate(placement: Placement, listener: socket.socket | None, command: Evaluate) -> int:
    """One rank of `dmnist evaluate`; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        console = make_console(stderr=command.json)
        result = score.run(
            world,
            command.checkpoint,
            model=command.model,
            dataset=command.dataset,
            folder=command.data,
            console=console,
        )
        if command.json and world.rank == 0:
            print_json(result)

    return run_in_group(placement, listener, body, device=command.device, debug=command.debug)


def verify(placement: Placement, listener: socket.socket | None, command: Verify) -> int:
    """One rank of a `dmnist verify` in a world of another launcher; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        under_launcher.run(world, ResultsTable.make(as_json=command.json, shown=world.rank == 0), signals)

    return run_in_group(placement, listener, body, device=command.device, debug=command.debug)


def doctor(placement: Placement, listener: socket.socket | None, command: Doctor) -> int:
    """One rank of `dmnist doctor`; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        console = make_console(stderr=command.json)
        torch.set_num_threads(1)  # as in training
        result = examine.run(world, command.out, command.dataset, command.data, console)
        if command.json and world.rank == 0:
            print_json(result)
        examine.conclude(result)

    return run_in_group(placement, listener, body, device=command.device, debug=command.debug)
