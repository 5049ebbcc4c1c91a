"""What one process of a group does for a command: join, work, print what only one should print.

Named by the launcher as `module:function`, so that the process that starts others need not import torch.
"""

import socket
from collections.abc import Callable
from functools import partial

from . import assess, ensemble, job, supply, witness
from .board import Board
from .console import make_console, print_json
from .datasets import Dataset
from .flags import Train, Verify
from .flags_use import Evaluate
from .layout import go_on
from .placement import Placement
from .process import run_in_group
from .signals import StopSignals
from .supply import Handed
from .world import World


def train(
    placement: Placement, listener: socket.socket | None, command: Train, handed: Handed | None = None
) -> int:
    """One rank of `dmnist train`; its exit code. `handed` is the data, where our launcher reads it."""

    def body(world: World, signals: StopSignals) -> None:
        result = job.run(
            world,
            command.settings,
            command.run,
            title=command.recipe,
            console=make_console(stderr=command.json),
            signals=signals,
            read=_reader(command, handed),
            tensorboard=command.tensorboard,
            go_on=go_on(command.run.out.parent, command.ensemble)
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
    placement: Placement, listener: socket.socket | None, command: Train, handed: Handed | None = None
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


def _reader(command: Train, handed: Handed | None) -> Callable[[], Dataset]:
    return handed.take if handed else partial(supply.read, command.run, make_console(stderr=command.json))


def evaluate(placement: Placement, listener: socket.socket | None, command: Evaluate) -> int:
    """One rank of `dmnist evaluate`; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        console = make_console(stderr=command.json)
        result = assess.run(
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
        witness.run(world, Board.make(as_json=command.json, shown=world.rank == 0), signals)

    return run_in_group(placement, listener, body, device=command.device, debug=command.debug)
