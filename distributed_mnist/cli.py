"""The `dmnist` command: from flags to what each command does. Heavy imports wait until one is needed."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import environment
from .errors import LaunchError, UsageError, tell, tidy_terminal, write_line
from .installed import version

if TYPE_CHECKING:
    from .flags import Bench, Train, Verify
    from .flags_use import Doctor, Evaluate
    from .placement import Placement


def main(arguments: list[str] | None = None) -> None:
    """The `dmnist` command. Ends the process with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" not in arguments:
        environment.keep_torch_quiet()
    try:
        if arguments == ["--version"]:
            sys.stdout.write(f"dmnist {version('distributed-mnist')}, torch {version('torch')}\n")
            sys.exit(0)
        if arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments):
            _begin_to_import_torch()
        from .grammar import parse  # and tyro, which takes a while

        command = parse(arguments)
        code = _COMMANDS[type(command).__name__](command)
    except KeyboardInterrupt:
        tidy_terminal(sys.stderr, cursor=True)
        write_line("stopped at once")
        code = 130
    except Exception as error:
        code = tell(error, debug="--debug" in arguments)
    sys.exit(code)


def _begin_to_import_torch() -> None:
    """In the server that workers are forked from, while this process imports and parses for itself."""
    from . import launch, spawn

    with contextlib.suppress(LaunchError):  # told later, by whoever needs the answer
        if launch.detect() is None:
            spawn.warm_up()


def _train(command: "Train") -> int:
    from . import launch, layout, spawn, supply
    from .console import make_console

    placement = launch.detect()
    nproc = command.run.nproc
    if placement is not None:
        _refuse_another_size(placement, nproc)
        if command.ensemble > 1:
            raise UsageError(
                f"--ensemble starts processes by itself: run it alone, not under {placement.launcher}"
            )
        return spawn.start(placement, None, "distributed_mnist.workers:train", command)
    nproc = nproc or launch.default_nproc(command.settings, command.run)
    command.settings.check_size(nproc)
    # One folder through all restarts, so chosen here.
    whole = command.run.out or layout.new_folder(command.recipe)
    command = dataclasses.replace(command, run=dataclasses.replace(command.run, out=whole))
    with supply.Supply(partial(supply.read, command.run, make_console(stderr=command.json))) as data:
        works = []
        for out, one in _members(command, whole):
            reached = partial(layout.newest_step, out)
            restarts = spawn.Restarts(
                command.run.max_restarts, reached, layout.go_on(whole, command.ensemble)
            )
            works.append(spawn.Work("distributed_mnist.workers:train", one, restarts, data.hand))
        if command.ensemble > 1:
            works.append(spawn.Work("distributed_mnist.workers:vote", command, hand=data.hand))
        return spawn.spawn(nproc, works)


def _members(command: "Train", out: Path) -> list[tuple[Path, "Train"]]:
    """The folder and the command of each network of an ensemble, or of the one there is."""
    from .layout import member_folder

    if command.ensemble == 1:
        return [(out, command)]
    seeds = range(command.settings.seed, command.settings.seed + command.ensemble)
    return [
        (
            member_folder(out, seed),
            dataclasses.replace(
                command,
                settings=command.settings.replace(seed=seed),
                run=dataclasses.replace(command.run, out=member_folder(out, seed)),
                recipe=f"{command.recipe} ({i} of {command.ensemble})",
            ),
        )
        for i, seed in enumerate(seeds, start=1)
    ]


def _evaluate(command: "Evaluate") -> int:
    from . import launch, spawn

    placement = launch.detect()
    if placement is not None:
        _refuse_another_size(placement, command.nproc)
    return spawn.start(placement, command.nproc, "distributed_mnist.workers:evaluate", command)


def _verify(command: "Verify") -> int:
    from . import launch, spawn

    placement = launch.detect()
    if placement is not None:
        _refuse_another_size(placement, command.nproc)
        if command.chaos:
            raise UsageError(
                f"--chaos starts and kills processes by itself: run it alone on a host, not under "
                f"{placement.launcher}"
            )
        return spawn.start(placement, None, "distributed_mnist.workers:verify", command)
    from . import verify  # imports torch

    return verify.run(
        command.nproc,
        command.device,
        chaos=command.chaos,
        faults=command.faults,
        seed=command.seed,
        as_json=command.json,
    )


def _doctor(command: "Doctor") -> int:
    from . import launch, spawn

    placement = launch.detect()
    if placement is not None:
        _refuse_another_size(placement, command.nproc)
        return spawn.start(placement, None, "distributed_mnist.doctor:work", command)
    nproc = command.nproc or launch.trial_nproc(command.device)
    return spawn.start(None, nproc, "distributed_mnist.doctor:work", command)


def _bench(command: "Bench") -> int:
    from . import bench, launch

    placement = launch.detect()
    if placement is not None:
        raise UsageError(f"bench starts processes by itself: run it alone, not under {placement.launcher}")
    chosen = {f.name: getattr(command, f.name) for f in dataclasses.fields(bench.Plan)}
    return bench.run(bench.Plan(**chosen), as_json=command.json)


def _later(module: str, function: str) -> Callable[[Any], int]:
    """A function of one of our modules, which is imported when it is called."""

    def command(flags: Any) -> int:
        return getattr(importlib.import_module(f".{module}", __package__), function)(flags)

    return command


def _refuse_another_size(placement: "Placement", nproc: int | None) -> None:
    if nproc not in (None, placement.local_size):
        raise UsageError(f"--nproc {nproc}, but {placement.launcher} started this process: leave it away")


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "Train": _train,
    "Evaluate": _evaluate,
    "Watch": _later("follow", "command"),
    "Predict": _later("predict", "command"),
    "Report": _later("report_command", "command"),
    "Verify": _verify,
    "Doctor": _doctor,
    "Bench": _bench,
    "Export": _later("export", "export"),
    "Fetch": _later("data_commands", "fetch"),
    "Check": _later("data_commands", "check"),
    "Generate": _later("data_commands", "generate"),
}


if __name__ == "__main__":
    main()
