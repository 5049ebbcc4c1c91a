"""CSV files with a row for each image: Kaggle's MNIST, Fashion-MNIST, EMNIST and the like.

The first line may name the columns. The labels are in a column with a name such as `label`, or without
names in the first column. The other columns are the pixels, row by row.
"""

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..common.regular_file import open_regular
from ..data import decode
from ..data.catalog import ENTRIES, Entry
from ..data.idx import GZIP_MAGIC, one_line
from ..data.recognise import column_names, label_column
from ..errors import DataError, reason
from .part import MAX_BYTES, Part, PartName, Progress, make_part

_MAX_LINE = 1 << 20  # bytes
_ROWS = 1024  # parsed at a time
_ID_COLUMNS = ("id", "imageid", "index", "unnamed: 0", "")
_UPRIGHT = "EMNIST's pictures are stored transposed, and were turned upright"


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read CSV files, raw or gzipped, one after the other."""
    tables = [_Table(path) for path in paths]
    images = np.concatenate([table.read(progress) for table in tables])
    labels = [table.labels for table in tables if table.labels is not None]
    where = one_line(paths[0])
    if 0 < len(labels) < len(tables):
        raise DataError(f"{where}: some of the {len(tables)} files have labels, and some have none")
    entry = _emnist(paths[0].name)
    if entry is None or not labels:
        return make_part(where, images, np.concatenate(labels) if labels else None)
    return make_part(
        where,
        decode.images(entry, paths[0], images),
        decode.labels(entry, paths[0], np.concatenate(labels)),
        entry.class_names,
        _UPRIGHT,
    )


def _emnist(name: str) -> Entry | None:
    """Return EMNIST's entry for a file such as `emnist-letters-train.csv`, otherwise None."""
    match = re.match(r"(emnist-[a-z]+)-(?:train|test)\b", name.lower())
    return ENTRIES.get(match[1]) if match else None


class _Table:
    """One CSV file."""

    def __init__(self, path: Path) -> None:
        self._path, self._where = path, one_line(path)
        self.labels: NDArray[np.uint8] | None = None

    def read(self, progress: Progress) -> NDArray[np.uint8]:
        """Return the images, and set `labels` if the file has any. Raises DataError."""
        try:
            with open_regular(self._path) as file:
                zipped = file.read(2) == GZIP_MAGIC
                file.seek(0)
                return self._parse(gzip.GzipFile(fileobj=file) if zipped else file, progress)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self._where}: damaged gzip data ({error})") from error
        except OSError as error:
            raise DataError(f"{self._where}: {reason(error)}") from error

    def _parse(self, file: Any, progress: Progress) -> NDArray[np.uint8]:
        lines = self._lines(file)
        first = next(lines, b"")
        try:
            names = column_names(first)
        except UnicodeDecodeError:
            raise DataError(f"{self._where}: its first line is not text") from None
        named = any(not re.fullmatch(r"\d+", name) for name in names)
        label = label_column(names) if named else 0 if math.isqrt(len(names)) ** 2 < len(names) else None
        ignored = {i for i, name in enumerate(names) if named and name in _ID_COLUMNS} | {label}
        pixels = [i for i in range(len(names)) if i not in ignored]
        side = math.isqrt(len(pixels))
        if side * side != len(pixels) or not side:
            raise DataError(
                f"{self._where}: {len(pixels)} pixel columns, which are no square picture; "
                "save other shapes as .npz, with arrays x_train, y_train, x_test and y_test"
            )
        blocks: list[NDArray[np.uint8]] = []
        rows = lines if named else itertools.chain([first], lines)
        start = 2 if named else 1
        most = MAX_BYTES // len(names)
        while block := list(itertools.islice(rows, _ROWS)):
            blocks.append(self._numbers(block, len(names), names, start))
            start += len(block)
            if start > most:
                raise DataError(f"{self._where}: more than {most:,} rows")
            progress(f"reading {self._path.name}", start, None)
        if not blocks:
            raise DataError(f"{self._where}: no rows in it")
        table = np.concatenate(blocks)
        self.labels = None if label is None else table[:, label].copy()
        return table[:, pixels].reshape(-1, side, side)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield the lines that are not empty, without end. Raises DataError for an absurdly long one."""
        while line := file.readline(_MAX_LINE):
            if len(line) == _MAX_LINE:
                raise DataError(f"{self._where}: has a line of more than {_MAX_LINE:,} bytes")
            if line := line.strip():
                yield line

    def _numbers(self, lines: list[bytes], columns: int, names: list[str], start: int) -> NDArray[np.uint8]:
        """Return the numbers in some lines, `(lines, columns)`; the first is row `start` of the file."""
        try:
            table = np.loadtxt(lines, np.uint8, delimiter=",", comments=None, ndmin=2)
            if table.shape[1] == columns:
                return table
        except (ValueError, OverflowError):
            pass
        for row, line in enumerate(lines, start):
            cells = line.split(b",")
            if len(cells) != columns:
                raise DataError(f"{self._where}: row {row} has {len(cells)} values, row 1 has {columns}")
            for column, cell in enumerate(cells, 1):
                if not re.fullmatch(rb"\s*\d{1,9}\s*", cell) or int(cell) > 255:
                    shown = ascii(cell.decode("ascii", "replace"))[:40]
                    raise DataError(
                        f"{self._where}: row {row}, column {column} is {shown}, "
                        "not a whole number from 0 to 255"
                    )
        raise DataError(f"{self._where}: rows {start} to {start + len(lines) - 1} cannot be read")
