"""The `dmnist` command: from flags to what each command does. Heavy imports wait until one is needed."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError, UsageError, tell
from .flags import Check, Evaluate, Fetch, Generate, Train, parse


def main(arguments: list[str] | None = None) -> None:
    """The `dmnist` command. Ends the process with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(arguments)
        code = _COMMANDS[type(command)](command)
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error, debug="--debug" in arguments)
    sys.exit(code)


def _train(command: Train) -> int:
    from . import launch, spawn

    placement = launch.detect()
    nproc = command.run.nproc
    if placement is not None and nproc not in (None, placement.local_size):
        raise UsageError(f"--nproc {nproc}, but {placement.launcher} started this process: leave it away")
    if placement is None:
        nproc = nproc or launch.default_nproc(command.settings, command.run)
        command.settings.check_size(nproc)
    return spawn.start(placement, nproc, "distributed_mnist.workers:train", command)


def _evaluate(command: Evaluate) -> int:
    from . import launch, spawn

    return spawn.start(launch.detect(), command.nproc, "distributed_mnist.workers:evaluate", command)


def _fetch(command: Fetch) -> int:
    from . import datasets
    from .observe import DataProgress, make_console

    console = make_console()
    with DataProgress(console) as progress:
        paths = datasets.fetch(
            command.dataset, command.data, mirrors=command.mirror or None, progress=progress
        )
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)
    return 0


def _check(command: Check) -> int:
    from . import datasets
    from .observe import make_console, print_json

    findings = datasets.check(command.dataset, command.data)
    console = make_console(stderr=command.json)
    for finding in findings:
        colour = "green" if finding.ok else "red"
        rows = "-" if finding.rows is None else f"{finding.rows:,}"
        console.print(
            f"[{colour}]{finding.verdict}[/]  {rows} rows  {finding.path}", highlight=False, soft_wrap=True
        )
    plain = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
    if command.json:
        print_json({"dataset": command.dataset, "files": plain})
    return 0 if all(finding.ok for finding in findings) else DataError.exit_code


def _generate(command: Generate) -> int:
    from . import datasets
    from .observe import DataProgress, make_console

    console = make_console()
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


if __name__ == "__main__":
    main()
