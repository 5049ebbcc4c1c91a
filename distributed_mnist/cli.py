"""The `dmnist` command: from flags to what each command does. Heavy imports wait until one is needed."""

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, UsageError, tell
from .flags import Check, Evaluate, Fetch, Generate, Train, Verify, parse

if TYPE_CHECKING:
    from rich.console import Console

    from .placement import Placement


def main(arguments: list[str] | None = None) -> None:
    """The `dmnist` command. Ends the process with a documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments == ["--version"]:
            sys.stdout.write(f"dmnist {_version('distributed-mnist')}, torch {_version('torch')}\n")
            sys.exit(0)
        command = parse(arguments)
        code = _COMMANDS[type(command)](command)
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error, debug="--debug" in arguments)
    sys.exit(code)


def _train(command: Train) -> int:
    from . import launch, layout, spawn

    placement = launch.detect()
    nproc = command.run.nproc
    if placement is not None:
        _refuse_another_size(placement, nproc)
        return spawn.start(placement, None, "distributed_mnist.workers:train", command)
    nproc = nproc or launch.default_nproc(command.settings, command.run)
    command.settings.check_size(nproc)
    # One folder through all restarts, so chosen here.
    out = command.run.out or layout.new_folder(command.recipe)
    command = dataclasses.replace(command, run=dataclasses.replace(command.run, out=out))
    go_on = f"--resume auto --out {out}"
    restarts = spawn.Restarts(command.run.max_restarts, lambda: layout.newest_step(out), go_on)
    return spawn.spawn(nproc, "distributed_mnist.workers:train", command, restarts)


def _evaluate(command: Evaluate) -> int:
    from . import launch, spawn

    return spawn.start(launch.detect(), command.nproc, "distributed_mnist.workers:evaluate", command)


def _verify(command: Verify) -> int:
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


def _fetch(command: Fetch) -> int:
    from . import datasets
    from .observe import make_console, print_json
    from .progress import DataProgress

    console = make_console(stderr=command.json)
    with DataProgress(console) as progress:
        paths = datasets.fetch(
            command.dataset, command.data, mirrors=command.mirror or None, progress=progress
        )
    if command.json:
        print_json({"dataset": command.dataset, "paths": [str(path) for path in paths]})
    else:
        _print_lines(console, [str(path) for path in paths])
    return 0


def _check(command: Check) -> int:
    from . import datasets
    from .observe import make_console, print_json

    console = make_console(stderr=command.json)
    with console.status(f"reading {command.dataset} in {command.data}"):
        findings = datasets.check(command.dataset, command.data)
    if command.json:
        plain = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
        print_json({"dataset": command.dataset, "files": plain})
    else:
        paths = [str(finding.path) for finding in findings]
        rows = ["-" if finding.rows is None else f"{finding.rows:,}" for finding in findings]
        wide, high = max(map(len, paths)), max(map(len, rows))
        lines = [
            (
                f"{path:<{wide}}  {count:>{high}} rows  ",
                finding.verdict,
                "green" if finding.ok else "bold red",
            )
            for path, count, finding in zip(paths, rows, findings, strict=True)
        ]
        _print_lines(console, lines)
    bad = [finding for finding in findings if not finding.ok]
    if bad:
        of = f"{len(bad)} of {len(findings)} files of {command.dataset} cannot be used"
        raise DataError(f"{of}: {', '.join(str(finding.path) for finding in bad)}")
    return 0


def _generate(command: Generate) -> int:
    from . import datasets
    from .observe import make_console, print_json
    from .progress import DataProgress

    console = make_console(stderr=command.json)
    with DataProgress(console) as progress:
        drawn = datasets.load(
            "generated",
            Path(),
            seed=command.data_seed,
            train_size=command.train_size,
            test_size=command.test_size,
            progress=progress,
        )
        paths = [str(path) for path in datasets.write(drawn, command.out, progress)]
    if command.json:
        from .digest import digest  # imports torch, a second or two

        sizes = {"train_size": command.train_size, "test_size": command.test_size}
        sha256 = digest(list(drawn.arrays().values()))  # as a run on these files tells it
        plain = {"dataset": "generated", **sizes, "data_seed": command.data_seed, "data_sha256": sha256}
        print_json({**plain, "paths": paths})
    else:
        told = f"{command.train_size:,} + {command.test_size:,} images drawn with seed {command.data_seed}"
        _print_lines(console, [*paths, f"{told}: use them with --dataset idx --data {command.out}"])
    return 0


def _refuse_another_size(placement: "Placement", nproc: int | None) -> None:
    if nproc not in (None, placement.local_size):
        raise UsageError(f"--nproc {nproc}, but {placement.launcher} started this process: leave it away")


def _print_lines(console: "Console", lines: Sequence[str | tuple[str, str, str]]) -> None:
    """Whole lines, as they are: text, or text and a verdict with its style."""
    from rich.text import Text

    for line in lines:
        plain, verdict, style = (line, "", "") if isinstance(line, str) else line
        console.print(Text.assemble(plain, (verdict, style)), soft_wrap=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_COMMANDS: dict[type, Callable[[Any], int]] = {
    Train: _train,
    Evaluate: _evaluate,
    Verify: _verify,
    Fetch: _fetch,
    Check: _check,
    Generate: _generate,
}


if __name__ == "__main__":
    main()
