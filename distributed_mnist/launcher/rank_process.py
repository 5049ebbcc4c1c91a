"""A process of a group, from its first line to its exit code."""

import os
import socket
import sys
from collections.abc import Callable

import torch

from ..common import environment
from ..common.placement import Placement
from ..distributed.devices import choose_device
from ..distributed.world import World
from ..errors import Interrupted, tell
from .signals import StoppedEarly, StopSignals, end_with

Body = Callable[[World, StopSignals], None]


def run_in_group(
    placement: Placement,
    listener: socket.socket | None,
    body: Body,
    *,
    device: str = "auto",
    backend: str | None = None,
    exact: bool = True,
    hang_after: float = 60.0,
    debug: bool = False,
    tell: Callable[..., int] = tell,
) -> int:
    """Join the group, call `body(world, signals)`, leave it; the exit code.

    `exact` asks the device's libraries for results that do not vary from call to call; `hang_after` is how
    many seconds the group may stand still; `tell` is called with what went wrong, and gives the code.
    """
    code = 0
    try:
        signals = StopSignals(placement)
        if placement.parent:  # torchrun's agent, killed, would leave us behind
            end_with(placement.parent)
        environment.keep_memory()
        if exact:
            environment.order_additions()
        chosen = torch.device("cpu") if device == "cpu" else choose_device(placement)
        world = World.connect(
            placement, device=chosen, backend=backend, listener=listener, hang_after=hang_after
        )
        body(world, signals)
        world.close()
    except StoppedEarly as early:
        code = tell(Interrupted(str(early)), placement, debug=debug)
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error, placement, debug=debug)
    if placement.size > 1:
        # Not by `return`: at the interpreter's end the backend's threads may still run, and abort the
        # process (one run in three under torchrun) or wait for a peer that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
