"""`dmnist data`: download, check or generate a data set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..data import datasets
from ..data.download_progress import DataProgress
from ..errors import DataError
from ..reporting.console import make_console, print_json


def fetch(*, dataset: str, data: Path, mirror: Sequence[str], as_json: bool) -> int:
    """Download a data set and print the paths. Returns the exit code. Raises `DataError`."""
    console = make_console(stderr=as_json)
    with DataProgress(console) as progress:
        paths = datasets.fetch(dataset, data, mirrors=mirror or None, progress=progress)
    if as_json:
        print_json({"dataset": dataset, "paths": [str(path) for path in paths]})
    else:
        _print_lines(console, [str(path) for path in paths])
    return 0


def check(*, dataset: str, data: Path, as_json: bool) -> int:
    """Print the state of each file. Returns the exit code. Raises `DataError` if any file is unusable."""
    console = make_console(stderr=as_json)
    with console.status(Text(f"reading {dataset} in {data}")):
        findings = datasets.check(dataset, data)
    if as_json:
        files = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
        print_json({"dataset": dataset, "files": files})
    else:
        paths = [str(finding.path) for finding in findings]
        rows = ["-" if finding.rows is None else f"{finding.rows:,}" for finding in findings]
        path_width, rows_width = max(map(len, paths)), max(map(len, rows))
        for path, count, finding in zip(paths, rows, findings, strict=True):
            line = f"{path:<{path_width}}  {count:>{rows_width}} rows  "
            style = "green" if finding.ok else "bold red"
            console.print(Text.assemble(line, (finding.verdict, style)), soft_wrap=True)
    bad = [finding for finding in findings if not finding.ok]
    if bad:
        counts = f"{len(bad)} of {len(findings)} files of {dataset} cannot be used"
        raise DataError(f"{counts}: {', '.join(str(finding.path) for finding in bad)}")
    return 0


def generate(*, out: Path, train_size: int, test_size: int, data_seed: int, as_json: bool) -> int:
    """Generate a data set and write it to `out`. Returns the exit code. Raises `DataError`."""
    console = make_console(stderr=as_json)
    with DataProgress(console) as progress:
        drawn = datasets.load(
            "generated",
            Path(),
            seed=data_seed,
            train_size=train_size,
            test_size=test_size,
            progress=progress,
        )
        paths = [str(path) for path in datasets.write(drawn, out, progress)]
    if as_json:
        from ..common.digest import digest  # noqa: PLC0415 - imports torch, which takes a second or two

        sha256 = digest(list(drawn.arrays().values()))  # as in a run's records
        sizes = {"train_size": train_size, "test_size": test_size}
        result = {"dataset": "generated", **sizes, "data_seed": data_seed, "data_sha256": sha256}
        print_json({**result, "paths": paths})
    else:
        summary = f"{train_size:,} + {test_size:,} images generated with seed {data_seed}"
        _print_lines(console, [*paths, f"{summary}: use them with --dataset idx --data {out}"])
    return 0


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines without wrapping."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)
