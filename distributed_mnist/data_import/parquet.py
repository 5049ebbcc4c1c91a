"""Parquet files as the Hugging Face hub has them: a column of images and a column of labels.

An image is a picture file (`{"bytes": ..., "path": ...}`, or bytes) or lists of numbers. The names of the
classes are in the file's metadata.
"""

import contextlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.installed import install
from ..common.regular_file import open_regular
from ..data.idx import one_line
from ..errors import DataError, UsageError, reason
from .part import MAX_BYTES, ImageStack, Part, PartName, Progress, make_part
from .picture import decode

_ROWS = 1024  # read at a time
_IMAGE_COLUMNS = ("image", "img", "pixels", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "digit")


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read Parquet files, one after the other."""
    if find_spec("pyarrow") is None:
        raise UsageError(f"Parquet files need the package pyarrow: {install('parquet')}")
    labels: list[NDArray[Any]] = []
    with contextlib.ExitStack() as opened:
        tables = [_Table(path, opened) for path in paths]
        count, done = sum(table.rows for table in tables), 0
        stack = ImageStack(count)
        for table in tables:
            for images, classes in table.batches():
                for i, image in enumerate(images):
                    stack.add(_image(image, f"{table.where}: row {done + i + 1}"), table.where)
                labels.append(classes)
                done += len(classes)
                progress(f"reading pictures to {part} with", done, count)
    has_labels = all(table.label is not None for table in tables)
    names = tables[0].class_names
    return make_part(tables[0].where, stack.images(), np.concatenate(labels) if has_labels else None, names)


class _Table:
    """One file: its columns, number of rows, and names of classes."""

    def __init__(self, path: Path, opened: contextlib.ExitStack) -> None:
        from pyarrow import ArrowException  # noqa: PLC0415 - an extra
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415

        self.where, self._damage = one_line(path), (ArrowException, OSError, ValueError)
        try:
            self._file = ParquetFile(opened.enter_context(open_regular(path)))
            columns: list[str] = self._file.schema_arrow.names
            metadata = self._file.metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        except self._damage as error:
            raise DataError(f"{self.where}: {_told(error)}") from None
        if size > MAX_BYTES:
            raise DataError(f"{self.where}: unpacks to {size:,} bytes, too many")
        self.rows: int = metadata.num_rows
        image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
        if image is None or not self.rows:
            what = f"has no column {' or '.join(_IMAGE_COLUMNS)}, but {', '.join(columns[:8])}"
            raise DataError(f"{self.where}: {what if self.rows else 'no rows in it'}")
        self.image = image
        self.label = next((name for name in _LABEL_COLUMNS if name in columns), None)
        self.class_names = self._class_names()

    def _class_names(self) -> list[str]:
        """Return the names in Hugging Face's metadata, `[]` if there are none."""
        stored: bytes = (self._file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(stored)["info"]["features"][self.label]["names"]
        except (ValueError, LookupError, TypeError):
            return []
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if is_list else []

    def batches(self) -> Iterator[tuple[list[Any], NDArray[Any]]]:
        """Yield images and labels of some rows at a time; zeros without labels. Raises DataError."""
        columns = [self.image] if self.label is None else [self.image, self.label]
        try:
            for batch in self._file.iter_batches(_ROWS, columns=columns):
                labels = np.zeros(len(batch), np.int64)
                if self.label is not None:
                    column = batch.column(self.label)
                    if column.null_count:
                        raise ValueError(f"rows without a {self.label}")
                    labels = column.to_numpy(zero_copy_only=False)
                yield batch.column(self.image).to_pylist(), labels
        except self._damage as error:
            raise DataError(f"{self.where}: {_told(error)}") from None


def _image(value: Any, where: str) -> NDArray[np.uint8]:
    """Return the pixels of an image in any of the usual forms. Raises DataError."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return decode(value, where)
    try:
        pixels = np.asarray(value)
    except ValueError:
        pixels = np.zeros(0, np.object_)
    side = round(pixels.size**0.5)
    if pixels.ndim == 1 and side * side == pixels.size:
        pixels = pixels.reshape(side, side)
    if pixels.dtype.kind not in "iu" or pixels.ndim not in (2, 3):
        raise DataError(f"{where}: its image is neither a picture file nor rows of whole numbers")
    return make_part(where, pixels[None], None).images[0]


def _told(error: Exception) -> str:
    text = reason(error) if isinstance(error, OSError) and error.strerror else str(error)
    return f"damaged, or not readable: {one_line(' '.join(text.split())[:120])}"
