"""The command line: the only place that knows flags. Heavy imports wait until a command needs them."""

import contextlib
import dataclasses
import io
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from .config import Recipe, Run, load_recipe
from .errors import DataError, UsageError, tell
from .placement import Placement

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Train:
    """Train a digit classifier; the same weights on any number of processes."""

    settings: tyro.conf.OmitArgPrefixes[Recipe]
    run: tyro.conf.OmitArgPrefixes[Run] = field(default_factory=Run)
    recipe: str = "default"
    """What the settings start from: a name (classic, default) or a TOML file. Flags override it."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on the test images: every image once, on any number of processes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of ours or of the original script."""
    dataset: str | None = None
    """Data set to score on; by default the one it was trained on."""
    data: Path = Path("data")
    """Folder with the data; what is missing is downloaded into it."""
    nproc: int | None = None
    """Processes to start here."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator if there is one. cpu: never."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Fetch:
    """Download a data set, verified, into a folder."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to put it in (torchvision's layout inside)."""
    mirror: tuple[str, ...] = ()
    """Base addresses to ask instead of the published ones."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Check:
    """Say what is in a folder of data: every file, its rows, its checksum, and whether it is sound."""

    dataset: tyro.conf.Positional[str] = "mnist"
    """Name of the data set."""
    data: Path = Path("data")
    """Folder to look in."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on standard output and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Generate:
    """Draw digits and write them as four IDX files, for --dataset idx here or for any other program."""

    out: tyro.conf.Positional[Path]
    """Folder to write to."""
    train_size: int = 60_000
    """Training images."""
    test_size: int = 10_000
    """Test images."""
    data_seed: int = 0
    """Key of the drawn digits."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


_SUMMARY = "Distributed training of digit classifiers: the same weights on any number of processes."


def main(arguments: list[str] | None = None) -> None:
    """The `dmnist` command. Ends the process with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(arguments)
        code = _COMMANDS[type(command)](command)
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error, debug="--debug" in arguments)
    sys.exit(code)


def parse(arguments: list[str]) -> Any:
    """The command with its flags, as one of the classes above.

    Prints help and exits for `--help`; raises `UsageError` for bad flags.
    """
    recipe = _named_recipe(arguments)
    train = Train(settings=load_recipe(recipe), recipe=recipe)
    data = Union[  # noqa: UP007 - `|` of Annotated types is not typed
        Annotated[Fetch, tyro.conf.subcommand("fetch")],
        Annotated[Check, tyro.conf.subcommand("check")],
        Annotated[Generate, tyro.conf.subcommand("generate")],
    ]
    grammar: Any = Union[  # noqa: UP007
        Annotated[Train, tyro.conf.subcommand("train", default=train)],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[data, tyro.conf.subcommand("data", description="Fetch, check or draw data sets.")],
    ]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(grammar, prog="dmnist", args=arguments, description=_SUMMARY)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_in_one_line(shown.getvalue())) from None


def _named_recipe(arguments: list[str]) -> str:
    """The value of `--recipe`, which decides the defaults of the flags beside it."""
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--recipe="):
            return argument.removeprefix("--recipe=")
    return "default"


def _in_one_line(box: str) -> str:
    """The first message in a box that tyro draws around its errors."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        if not line or set(line) <= set("─╰╯-"):
            break
        message.append(line)
    return (" ".join(message) or "bad command line") + " (--help lists the flags)"


def _train(command: Train) -> int:
    from . import launch

    placement = launch.detect(os.environ)
    recipe, options = command.settings, command.run
    if placement is None:
        nproc = options.nproc or launch.default_nproc(recipe, options)
        return _start(nproc, _train_worker, command)
    if options.nproc not in (None, placement.local_size):
        raise UsageError(
            f"--nproc {options.nproc}, but {placement.launcher} started this process already: leave it away"
        )
    return _train_worker(placement, None, command)


def _train_worker(placement: Placement, listener: socket.socket | None, command: Train) -> int:
    from . import job
    from .process import run_in_group
    from .signals import StopSignals
    from .world import World

    def body(world: World, signals: StopSignals) -> None:
        result = job.run(
            world,
            command.settings,
            command.run,
            title=command.recipe,
            console=_console(command.json),
            signals=signals,
        )
        _print_json(command.json and world.rank == 0, result)

    exact = command.settings.sync == "tree"
    return run_in_group(
        placement, listener, body, device=command.run.device, exact=exact, debug=command.debug
    )


def _evaluate(command: Evaluate) -> int:
    from . import launch

    placement = launch.detect(os.environ)
    if placement is not None:
        return _evaluate_worker(placement, None, command)
    return _start(command.nproc or 1, _evaluate_worker, command)


def _evaluate_worker(placement: Placement, listener: socket.socket | None, command: Evaluate) -> int:
    from . import assess
    from .process import run_in_group
    from .signals import StopSignals
    from .world import World

    def body(world: World, signals: StopSignals) -> None:
        console = _console(command.json)
        result = assess.run(world, command.checkpoint, command.dataset, command.data, console)
        _print_json(command.json and world.rank == 0, result)

    return run_in_group(placement, listener, body, device=command.device, debug=command.debug)


def _start(nproc: int, worker: Callable[..., int], command: Any) -> int:
    """Here if it is one process, else in `nproc` of our own."""
    if nproc == 1:
        return worker(Placement(), None, command)
    from .spawn import spawn

    return spawn(nproc, worker, (command,))


def _fetch(command: Fetch) -> int:
    from . import datasets
    from .observe import DataProgress

    console = _console(False)
    with DataProgress(console) as progress:
        paths = datasets.fetch(
            command.dataset, command.data, mirrors=command.mirror or None, progress=progress
        )
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)
    return 0


def _check(command: Check) -> int:
    from . import datasets

    findings = datasets.check(command.dataset, command.data)
    console = _console(command.json)
    for finding in findings:
        colour = "green" if finding.ok else "red"
        rows = "-" if finding.rows is None else f"{finding.rows:,}"
        console.print(
            f"[{colour}]{finding.verdict}[/]  {rows} rows  {finding.path}", highlight=False, soft_wrap=True
        )
    plain = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
    _print_json(command.json, {"dataset": command.dataset, "files": plain})
    return 0 if all(finding.ok for finding in findings) else DataError.exit_code


def _generate(command: Generate) -> int:
    from . import datasets
    from .observe import DataProgress

    console = _console(False)
    with DataProgress(console) as progress:
        drawn = datasets.load(
            "generated",
            Path(),
            seed=command.data_seed,
            train_size=command.train_size,
            test_size=command.test_size,
            progress=progress,
        )
    for path in datasets.write(drawn, command.out):
        console.print(path, highlight=False, soft_wrap=True)
    return 0


_COMMANDS: dict[type, Callable[[Any], int]] = {
    Train: _train,
    Evaluate: _evaluate,
    Fetch: _fetch,
    Check: _check,
    Generate: _generate,
}


def _console(json_output: bool) -> "Console":
    """Where people read: standard output, or standard error where that belongs to a JSON object."""
    from rich.console import Console

    console = Console(stderr=json_output)
    if not console.is_terminal:
        console.width = 1000  # whoever reads a file or a pipe wants whole lines
    return console


def _print_json(wanted: bool, value: dict[str, Any]) -> None:
    if wanted:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
