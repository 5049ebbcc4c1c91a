"""The `dmnist` command: parse the flags and run the command. Slow imports happen only when needed."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import environment
from ..errors import Interrupted, LaunchError, UsageError, print_error, tidy_terminal, write_line
from ..launcher.signals import StoppedEarly, signals_raise
from . import surroundings

if TYPE_CHECKING:
    from ..common.placement import Placement
    from .flags_train import Bench, Train, Verify
    from .flags_use import Doctor, Evaluate

_WORKERS = "distributed_mnist.cli.workers"
_ALONE = ("predict", "report", "watch", "stop", "export", "bench", "data")
"""Commands that run in one process under any launcher."""


def main(arguments: list[str] | None = None) -> None:
    """Run the `dmnist` command and exit with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" not in arguments:
        environment.keep_torch_quiet()
    with signals_raise():
        try:
            code = _run(arguments)
        except KeyboardInterrupt:
            tidy_terminal(sys.stderr, cursor=True)
            write_line("stopped at once")
            code = 130
        except StoppedEarly as early:
            tidy_terminal(sys.stderr, cursor=True)
            code = print_error(Interrupted(str(early)))
    sys.exit(surroundings.finish(code))


def _run(arguments: list[str]) -> int:
    """Run a command, report its error, and return its exit code."""
    try:
        surroundings.prepare()
        if "--version" in arguments:
            from ..common.installed import version

            sys.stdout.write(f"dmnist {version('distributed-mnist')}, torch {version('torch')}\n")
            return 0
        # With --detach, the server must start in the background, after the flags are parsed.
        if arguments[:1] == ["train"] and not {"-h", "--help", "--detach"} & set(arguments):
            _start_importing_torch()
        from .parser import parse  # imports tyro, which takes a while

        command = parse(arguments)
        return _COMMANDS[type(command).__name__](command)
    except SystemExit as end:  # after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        code = print_error(error, debug="--debug" in arguments)
        with contextlib.suppress(Exception):  # the error has been told here
            _tell_other_ranks(arguments, error)
        return code


def _start_importing_torch() -> None:
    """Start the fork server, which imports torch while this process imports tyro and parses the flags."""
    from ..distributed.detect_launcher import detect
    from ..launcher import fork_server

    with contextlib.suppress(LaunchError):  # raised again when the command detects the launcher
        if detect() is None:
            fork_server.warm_up(f"{_WORKERS}:train")


def _tell_other_ranks(arguments: list[str], error: Exception) -> None:
    """Under another launcher, tell the other ranks that this one cannot take part."""
    from ..distributed.detect_launcher import detect
    from ..distributed.rendezvous import tell_failure

    placement = detect()
    if placement is not None and arguments and arguments[0] not in _ALONE:
        tell_failure(placement, error)


def _train(command: "Train") -> int:
    from ..data import prefetch
    from ..launcher import spawn
    from ..launcher.default_nproc import default_nproc
    from ..reporting.console import make_console
    from ..runs import layout

    placement = _detect_placement(command.run.nproc)
    if placement is not None:
        if command.ensemble > 1 or command.detach:
            name = "--detach" if command.detach else "--ensemble"
            raise UsageError(
                f"{name} starts its own processes: run it alone, not under {placement.launcher}"
            )
        return spawn.start(placement, None, f"{_WORKERS}:train", command)
    # Choose the folder here, so that all restarts use the same one.
    out = command.run.out or layout.new_folder(command.recipe)
    command = dataclasses.replace(command, run=dataclasses.replace(command.run, out=out))
    members = _split_into_members(command, out)
    if command.detach:
        from .detach import detach

        if (code := detach(out, members[0].run.out or out, as_json=command.json)) is not None:
            return code
    nproc = command.run.nproc or default_nproc(command.settings, command.run)
    command.settings.check_size(nproc)
    resume_flags = layout.resume_flags(out, command.ensemble)
    if command.dry_run or command.summary:
        return spawn.spawn(nproc, [spawn.Task(f"{_WORKERS}:train", members[0])])
    read = partial(prefetch.read, command.run, make_console(stderr=command.json))
    with prefetch.Prefetcher(read) as data:
        tasks = []
        for member in members:
            reached = partial(layout.newest_step, member.run.out or out)
            restarts = spawn.Restarts(command.run.max_restarts, reached, resume_flags)
            tasks.append(spawn.Task(f"{_WORKERS}:train", member, restarts, data.for_rank_zero))
        if command.ensemble > 1:
            tasks.append(spawn.Task(f"{_WORKERS}:vote", command, rank_zero_argument=data.for_rank_zero))
        return spawn.spawn(nproc, tasks)


def _split_into_members(command: "Train", out: Path) -> list["Train"]:
    """The command for each member of an ensemble; for a single network, the command itself."""
    from ..runs.layout import member_folder

    if command.ensemble == 1:
        return [command]
    members = []
    for i in range(command.ensemble):
        settings = command.settings.replace(seed=command.settings.seed + i)
        run = dataclasses.replace(command.run, out=member_folder(out, settings.seed))
        recipe = f"{command.recipe} ({i + 1} of {command.ensemble})"
        members.append(dataclasses.replace(command, settings=settings, run=run, recipe=recipe))
    return members


def _evaluate(command: "Evaluate") -> int:
    from ..launcher import spawn

    placement = _detect_placement(command.nproc)
    return spawn.start(placement, command.nproc, f"{_WORKERS}:evaluate", command)


def _verify(command: "Verify") -> int:
    from ..launcher import spawn
    from ..launcher.default_nproc import trial_nproc

    placement = _detect_placement(command.nproc)
    if placement is not None:
        if command.chaos:
            raise UsageError(
                "--chaos starts and kills its own processes: run it alone on a host, not under "
                f"{placement.launcher}"
            )
        return spawn.start(placement, None, f"{_WORKERS}:verify", command)
    if command.chaos:
        return _call("verify.tree.chaos", "run", command)
    nproc = command.nproc or trial_nproc(command.device)
    return spawn.start(None, nproc, f"{_WORKERS}:verify", command)


def _doctor(command: "Doctor") -> int:
    from ..launcher import spawn
    from ..launcher.default_nproc import trial_nproc

    placement = _detect_placement(command.nproc)
    nproc = None if placement else command.nproc or trial_nproc(command.device)
    return spawn.start(placement, nproc, f"{_WORKERS}:doctor", command)


def _bench(command: "Bench") -> int:
    placement = _detect_placement(None)
    if placement is not None:
        raise UsageError(f"bench starts its own processes: run it alone, not under {placement.launcher}")
    return _call("bench.command", "run", command)


def _call(module: str, function: str, command: Any) -> int:
    """Import a module of this package and call its function with the command's flags as keyword arguments.

    `--json` is passed as `as_json`. `--debug` is not passed: only `main` needs it.
    """
    flags = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    del flags["debug"]
    imported = importlib.import_module(f"..{module}", __package__)
    return getattr(imported, function)(as_json=flags.pop("json"), **flags)


def _detect_placement(nproc: int | None) -> "Placement | None":
    """This process's placement if another launcher started it, otherwise None.

    Raises `UsageError` if `--nproc` differs from the number of processes that the launcher started here.
    """
    from ..distributed.detect_launcher import detect, unused_nodes

    placement = detect()
    if placement is None and (note := unused_nodes()):
        write_line(note)
    if placement is not None and nproc not in (None, placement.local_size):
        raise UsageError(
            f"--nproc {nproc}, but {placement.launcher} started {placement.local_size} processes here: "
            "leave out --nproc"
        )
    return placement


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "Train": _train,
    "Evaluate": _evaluate,
    "Stop": partial(_call, "cli.stop", "run"),
    "Watch": partial(_call, "reporting.watch", "run"),
    "Predict": partial(_call, "inference.predict", "run"),
    "Report": partial(_call, "reporting.html_report", "run"),
    "Verify": _verify,
    "Doctor": _doctor,
    "Bench": _bench,
    "Export": partial(_call, "export.command", "run"),
    "Fetch": partial(_call, "cli.data_commands", "fetch"),
    "Check": partial(_call, "cli.data_commands", "check"),
    "Import": partial(_call, "data_import.command", "run"),
    "Generate": partial(_call, "cli.data_commands", "generate"),
}


if __name__ == "__main__":
    main()
