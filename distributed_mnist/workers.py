"""What one process of a group does for a command: join, work, print what only one should print.

Named by the launcher as `module:function`, so that the process that starts others need not import torch.
"""

import socket

from . import assess, job, witness
from .board import Board
from .flags import Evaluate, Train, Verify
from .observe import make_console, print_json
from .placement import Placement
from .process import run_in_group
from .signals import StopSignals
from .world import World


def train(placement: Placement, listener: socket.socket | None, command: Train) -> int:
    """One rank of `dmnist train`; its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        result = job.run(
            world,
            command.settings,
            command.run,
            title=command.recipe,
            console=make_console(stderr=command.json),
            signals=signals,
        )
        if command.json and world.rank == 0:
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
