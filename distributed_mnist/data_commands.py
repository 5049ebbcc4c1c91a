"""`dmnist data`: fetch, check or draw a data set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from . import datasets
from .console import make_console, print_json
from .errors import DataError
from .flags_data import Check, Fetch, Generate
from .progress import DataProgress


def fetch(command: Fetch) -> int:
    """Download; the exit code. Raises `DataError`."""
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


def check(command: Check) -> int:
    """Tell what is there; the exit code. Raises `DataError` for files that cannot be used."""
    console = make_console(stderr=command.json)
    with console.status(Text(f"reading {command.dataset} in {command.data}")):
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


def generate(command: Generate) -> int:
    """Draw and write; the exit code. Raises `DataError`."""
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
        from .digest import digest  # noqa: PLC0415 - imports torch, a second or two

        sizes = {"train_size": command.train_size, "test_size": command.test_size}
        sha256 = digest(list(drawn.arrays().values()))  # as a run on these files tells it
        plain = {"dataset": "generated", **sizes, "data_seed": command.data_seed, "data_sha256": sha256}
        print_json({**plain, "paths": paths})
    else:
        told = f"{command.train_size:,} + {command.test_size:,} images drawn with seed {command.data_seed}"
        _print_lines(console, [*paths, f"{told}: use them with --dataset idx --data {command.out}"])
    return 0


def _print_lines(console: Console, lines: Sequence[str | tuple[str, str, str]]) -> None:
    """Whole lines, as they are: text, or text and a verdict with its style."""
    for line in lines:
        plain, verdict, style = (line, "", "") if isinstance(line, str) else line
        console.print(Text.assemble(plain, (verdict, style)), soft_wrap=True)
