"""Run one rank of a group: connect, do the work, and turn errors into an exit code."""

import os
import socket
import sys
from collections.abc import Callable

from ..common import environment
from ..common.placement import Placement
from ..common.streams import try_to_write
from ..distributed.devices import choose_device
from ..distributed.peer import JobDescription
from ..distributed.world import World
from ..errors import Interrupted, UsageError, print_error
from .signals import StoppedEarly, StopSignals, stop_with_parent

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
    job: JobDescription | None = None,
    shared: bool = False,
    debug: bool = False,
    report_error: Callable[..., int] = print_error,
) -> int:
    """Join the group, call `body(world, signals)`, leave the group, and return the exit code.

    Under another launcher, in a group of more than one process, this function ends the process. `exact`
    asks the device's libraries for results that do not vary from call to call. `hang_after` is how many
    seconds the group may go without progress. `job` describes what all ranks must have in common. `shared`
    is whether several may be on one device. `report_error` is called with an exception and returns the exit
    code.
    """
    code = 0
    try:
        signals = StopSignals(placement)
        if placement.parent:  # torchrun's agent: if it is killed, nothing else stops this process
            stop_with_parent(placement.parent)
        environment.keep_memory()
        if exact:
            environment.order_additions()
        chosen = choose_device(placement, device, shared=shared)
        world = World.connect(
            placement,
            device=chosen,
            backend=backend,
            listener=listener,
            hang_after=hang_after,
            job=job,
            shared=shared,
        )
        body(world, signals)
        world.close()
    except StoppedEarly as early:
        code = report_error(Interrupted(str(early)), placement, debug=debug)
    except SystemExit as error:  # of a user's model
        told = UsageError(f"the model ended the program with sys.exit({error.code!r})")
        code = report_error(told, placement, debug=debug)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, placement, debug=debug)
    if placement.size > 1 and placement.launcher != "spawned":  # `run_worker` does the same
        # Do not return. While the interpreter shuts down, the backend's threads may still run and abort the
        # process (one run in three under torchrun), or wait for a peer that is gone.
        try_to_write(sys.stdout, "")
        try_to_write(sys.stderr, "")
        os._exit(code)
    return code
