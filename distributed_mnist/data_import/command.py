"""`dmnist data import`: read a data set in another format, check it, and write it as IDX files."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..data import datasets
from ..data.catalog import ROLES
from ..data.download_progress import DataProgress
from ..data.idx import digest, one_line
from ..data.recognise import Found, recognise
from ..errors import DataError
from ..reporting.console import make_console, print_json
from .assemble import Assembled, assemble, split_off
from .formats import reader
from .part import Part, PartName, Progress


def run(*, source: Path, data: Path, test: Path | None, test_fraction: float | None, as_json: bool) -> int:
    """Import `source` into the folder `data`, and say what was read and written. Returns the exit code.

    `test` is the path of the test part, if it is not in `source`. With `test_fraction`, a random part of
    the training images becomes the test part. Raises DataError, and then leaves no file behind.
    """
    console = make_console(stderr=as_json)
    found = recognise(source)
    with DataProgress(console) as progress:
        imported = _read(found, test, test_fraction, progress)
        names = imported.class_names
        paths = datasets.write_arrays(imported.arrays, data, progress, names=imported.names_to_write())
    known = imported.known_as()
    dataset = known or "idx"
    files = [
        {"path": str(path), "shape": list(array.shape), "sha256": digest(array)}
        for path, array in zip(paths, (imported.arrays[role] for role in ROLES), strict=True)
    ]
    left_out = [str(path) for path in found.left_out]
    if as_json:
        summary = {"format": found.kind, "dataset": dataset, "class_names": list(names), "files": files}
        print_json({**summary, "notes": list(imported.notes), "left_out": left_out})
    else:
        _print_lines(console, _report(found, imported, files, dataset, data))
    return 0


def _read(found: Found, test: Path | None, fraction: float | None, progress: Progress) -> Assembled:
    """Read both parts. Raises DataError."""
    train_part = _read_part(found, "train", progress)
    if train_part is None or train_part.labels is None:
        raise DataError(f"{one_line(found.train[0])}: has no labels, so nothing can be learnt from it")
    if fraction is not None:
        return assemble(*split_off(train_part, fraction))
    if test is None:
        test_part, where = _read_part(found, "test", progress), found.test
    else:
        other = recognise(test)
        where = other.test or other.train
        test_part = _read_part(Found(other.kind, other.train, where), "test", progress)
        if test_part is None:  # an archive of arrays with a training part only
            test_part = _read_part(other, "train", progress)
    if test_part is None or test_part.labels is None:
        why = (
            f"{one_line(where[0])} has no labels"
            if test_part
            else f"{one_line(found.train[0])} has no test part"
        )
        raise DataError(f"{why}: name one with --test PATH, or add --test-fraction 0.1 to split one off")
    return assemble(train_part, test_part)


def _read_part(found: Found, part: PartName, progress: Progress) -> Part | None:
    paths = found.train if part == "train" else found.test
    return reader(found.kind)(paths, part, progress) if paths else None


def _report(
    found: Found, imported: Assembled, files: list[dict[str, object]], dataset: str, data: Path
) -> list[str]:
    """Return lines for people: what was read, what was written, and how to use it."""
    lines = [f"read {found}", *imported.notes]
    if found.left_out:
        lines.append(f"left out: {', '.join(map(one_line, found.left_out[:4]))}")
    for role, file in zip(ROLES, files, strict=True):
        count, *sides = imported.arrays[role].shape
        size = f" of {sides[1]} x {sides[0]}{' in colour' if len(sides) > 2 else ''}" if sides else ""
        lines.append(f"{file['path']}  {count:,} {role.partition('_')[2]}{size}")
        lines.append(f"  sha256 {file['sha256']}")
    names = imported.class_names
    shown = ", ".join(names if len(names) < 12 else (*names[:10], "..."))
    lines.append(f"{len(names)} classes: {shown}")
    known = f"this is {dataset}: its checksums are right; " if dataset != "idx" else ""
    lines.append(f"{known}use it with --dataset {dataset} --data {shlex.quote(str(data))}")
    return lines


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)
