"""Recognise data sets in other formats, which `dmnist data import` turns into IDX files.

The content of a file determines its format. Names only tell the training files from the test files.
Nothing is read here but the beginnings of files, and nothing slow is imported.
"""

import contextlib
import gzip
import math
import os
import re
import shlex
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ..common.regular_file import open_regular
from ..errors import DataError, reason
from .catalog import ENTRIES, ROLES, Role
from .idx import GZIP_MAGIC, one_line

Kind = Literal[
    "npz", "csv", "parquet", "torch", "cifar-binary", "cifar-python", "pictures", "idx", "archive"
]
TITLES: dict[Kind, str] = {
    "npz": "NumPy arrays (.npz)",
    "csv": "CSV",
    "parquet": "Parquet",
    "torch": "torch tensors (.pt)",
    "cifar-binary": "CIFAR's binary files",
    "cifar-python": "CIFAR's Python files",
    "pictures": "folders of pictures",
    "idx": "IDX",
    "archive": "an archive",
}
_HEAD = 1 << 16  # bytes
_MAX_FILES = 1000  # examined in one folder tree; a folder of pictures counts as one
_MAX_DEPTH = 3  # folders below the source, as in `source/mnist_png/training/0`
_SHOWN = 4
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_NETPBM = re.compile(rb"P[1-6]\s")
_PART_WORDS = {
    "test": re.compile(r"(?<![a-z])(?:test|testing|t10k)(?:set)?(?![a-z])"),
    "train": re.compile(r"(?<![a-z])(?:train|training)(?:set)?(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(?:val|valid|validation)(?:set)?(?![a-z])"),
}
_SHARD = re.compile(r"[-_]?\d+(?:-of-\d+)?$")  # `train-00000-of-00002`, `data_batch_1`
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, before version 1.6
_BEGINNINGS: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    _LEGACY_TORCH: "torch",
    b"BZh": "archive",
    b"\xfd7zXZ": "archive",
    b"7z\xbc\xaf": "archive",
}
_LABEL_COLUMNS = ("label", "labels", "class", "target", "digit")
_CIFAR_ROWS = ((3073, (10,)), (3074, (20, 100)))  # bytes for an image, and its numbers of classes


@dataclass(frozen=True)
class Found:
    """A data set: the files of its parts, or for pictures the folder around the classes' folders."""

    kind: Kind
    train: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()  # such as a validation part

    def __str__(self) -> str:
        return f"{one_line(self.train[0])} ({TITLES[self.kind]})"


def recognise(source: Path) -> Found:
    """Return the data set in a file or folder.

    Raises DataError if there is none or several, and for an archive that must be unpacked first.
    """
    try:
        sets = _sets_in(source)
    except (OSError, ValueError) as error:  # ValueError: a name that contains NUL
        why = reason(error) if isinstance(error, OSError) else "not a file name"
        raise DataError(f"{one_line(source)}: {why}") from error
    archives = [found for found in sets if found.kind == "archive"]
    sets = [found for found in sets if found.kind != "archive"]
    if len(sets) > 1:  # IDX files under MNIST's names may be the result of an import
        own = ENTRIES["idx"].file("train_images").spellings()
        sets = [found for found in sets if found.kind != "idx" or found.train[0].name not in own]
    if not sets and archives:
        raise DataError(f"{one_line(archives[0].train[0])}: an archive: unpack it and import the folder")
    if not sets:
        known = ", ".join(title for kind, title in TITLES.items() if kind != "archive")
        raise DataError(f"{one_line(source)}: no data set of a known format is in it ({known})")
    if len(sets) > 1:
        more = f" and {len(sets) - _SHOWN} more" if len(sets) > _SHOWN else ""
        raise DataError(
            f"{one_line(source)}: holds {len(sets)} data sets: {', '.join(map(str, sets[:_SHOWN]))}{more}; "
            "import one of these paths, and give its test part with --test"
        )
    return sets[0]


def import_hint(folder: Path) -> str | None:
    """Return what a folder without IDX files holds, and the command that imports it; None if nothing."""
    with contextlib.suppress(OSError, ValueError):
        sets = [found for found in _sets_in(folder) if found.kind not in ("idx", "archive")]
        if sets:
            source = folder if len(sets) == 1 else sets[0].train[0]
            command = f"dmnist data import {shlex.quote(str(source))} --data {shlex.quote(str(folder))}"
            return f"it holds {sets[0]}: {command}"
    return None


def _sets_in(source: Path) -> list[Found]:
    """Return all data sets in a file or a folder. Raises OSError."""
    if not source.is_dir():
        kind = _kind_of(source)
        if kind == "idx":
            beside = _group(source.parent, filter(Path.is_file, source.parent.iterdir()))
            return [found for found in beside if source in (*found.train, *found.test)]
        return [] if kind is None else [_found(kind, {"train": [source]})]
    return _group(source, _files_below(source, _MAX_DEPTH))


def _files_below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders; a folder of pictures instead of its pictures."""
    entries = sorted(folder.iterdir(), key=natural_order)
    entries = [path for path in entries if not path.name.startswith(".")]
    files = [path for path in entries if path.is_file()]
    if files and is_picture(files[0]):
        yield folder
        return
    yield from files
    for path in entries:
        if depth and path.is_dir():
            yield from _files_below(path, depth - 1)


def _group(source: Path, paths: Iterable[Path]) -> list[Found]:
    """Sort files into data sets: files of one kind with the same name, apart from words like `train`."""
    sets: dict[tuple[Kind, Path, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    trees: dict[Path, int] = defaultdict(int)
    for _, path in zip(range(_MAX_FILES), paths, strict=False):
        if path.is_dir():
            trees[path.parent] += path != source
            continue
        kind = _kind_of(path)
        if kind == "idx":
            for name, role in _idx_roles(path.name):
                sets[kind, path.parent, name][role].append(path)
        elif kind is not None:
            # The names of CIFAR's files, `data_batch_1` and `test_batch`, have nothing in common.
            name = "" if kind.startswith("cifar") else _without_part(path.name)
            sets[kind, path.parent, name][_part_of(path, source)].append(path)
    for tree in trees:
        parent, name = (tree, "") if tree == source else (tree.parent, _without_part(tree.name))
        sets["pictures", parent, name][_part_of(tree, source)].append(tree)
    return [_found(kind, parts) for (kind, _, _), parts in sets.items() if _is_whole(kind, parts, trees)]


def _is_whole(kind: Kind, parts: dict[str, list[Path]], classes: dict[Path, int]) -> bool:
    """Return whether a data set has what it needs; `classes` counts the subfolders with pictures."""
    if kind == "idx":
        return all(role in parts for role in ROLES)
    return kind != "pictures" or max(classes[tree] for trees in parts.values() for tree in trees) > 1


def _found(kind: Kind, parts: dict[str, list[Path]]) -> Found:
    if kind == "idx":
        train, test = (
            tuple(parts[f"{part}_{what}"][0] for what in ("images", "labels")) for part in ("train", "test")
        )
        return Found(kind, train, test)
    name = next(name for name in ("train", "", "test", "validation") if parts.get(name))
    train = tuple(parts[name])
    test = tuple(parts.get("test", ())) if name != "test" else ()
    if kind == "npz" and not test:
        test = train  # both parts are usually in one file
    rest = [path for part in parts.values() for path in part if path not in (*train, *test)]
    return Found(kind, train, test, tuple(rest))


def _idx_roles(name: str) -> Iterator[tuple[str, Role]]:
    """Yield the data sets that have an IDX file of this name, and its role there."""
    for entry in ENTRIES.values():
        if not entry.shares_names or entry.name == "idx":
            for role in ROLES:
                if name in entry.file(role).spellings():
                    yield entry.name, role


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _part_of(path: Path, source: Path) -> str:
    """Return which part a file or folder is, by its name or else those of the folders up to `source`."""
    for name in reversed(path.relative_to(source).parts):
        for part, words in _PART_WORDS.items():
            if words.search(name.lower()):
                return part
    return ""


def _without_part(name: str) -> str:
    stem = _SHARD.sub("", name.lower().partition(".")[0])
    for words in _PART_WORDS.values():
        stem = words.sub("", stem)
    return stem.strip("-_ ")


def is_picture(path: Path) -> bool:
    """Return whether a file begins like a picture. Raises OSError."""
    with open_regular(path) as file:
        head = file.read(8)
    return head.startswith(_PICTURES) or _NETPBM.match(head) is not None


def _kind_of(path: Path) -> Kind | None:
    """Return a file's format, None if it is no data set in a known format. Raises OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD)
        if head.startswith(b"PK\x03\x04"):
            return _zip_kind(file, path.suffix)
        if head.startswith(GZIP_MAGIC):
            file.seek(0)
            size = 0
            try:
                head = gzip.GzipFile(fileobj=file).read(_HEAD)
            except (OSError, EOFError, zlib.error):
                return None
    return _content_kind(head, size)


def _content_kind(head: bytes, size: int) -> Kind | None:
    """Return the format of unpacked content; `size` is 0 if it is unknown."""
    for start, kind in _BEGINNINGS.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "archive"
    if re.match(rb"\0\0[\x08-\x0e][\x01-\x04]\0", head):
        return "idx"
    if head.startswith(b"\x80") and b"label_names" not in head:
        return "cifar-python" if re.search(rb"batch_label|labels|filenames", head) else None
    for width, classes in _CIFAR_ROWS:
        rows = range(0, len(head) - len(classes), width)
        labels = [(head[row + i], most) for row in rows for i, most in enumerate(classes)]
        if size and size % width == 0 and all(label < most for label, most in labels):
            return "cifar-binary"
    return "csv" if _is_table(head.partition(b"\n")[0]) else None


def _zip_kind(file: BinaryIO, suffix: str) -> Kind:
    """Return the format of a zip file; the suffix tells it if the file is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        damaged: dict[str, Kind] = {".npz": "npz", ".pt": "torch"}
        return damaged.get(suffix, "archive")
    if any(name.endswith(".npy") for name in names):
        return "npz"
    return "torch" if any(name.endswith("/data.pkl") for name in names) else "archive"


def _is_table(line: bytes) -> bool:
    """Return whether a CSV file's first line has labels and pixels, or their names."""
    try:
        cells = column_names(line)
    except UnicodeDecodeError:
        return False
    if all(re.fullmatch(r"\d{1,3}", cell) for cell in cells):
        return any(math.isqrt(count) ** 2 == count >= 64 for count in (len(cells), len(cells) - 1))
    return len(cells) >= 64 and (label_column(cells) is not None or any("pixel" in cell for cell in cells))


def column_names(line: bytes) -> list[str]:
    """Return the cells of a CSV file's first line, in lower case. Raises UnicodeDecodeError."""
    return [cell.strip(" \t\r\"'").lower() for cell in line.decode("utf-8-sig").split(",")]


def label_column(names: list[str]) -> int | None:
    """Return the index of the column that holds the labels, None if no column is called so."""
    return next((names.index(name) for name in _LABEL_COLUMNS if name in names), None)
