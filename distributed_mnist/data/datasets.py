"""Data sets by name: `load("mnist", Path("data"))` finds, downloads or draws one and checks it.

Meant for one process: it reads files and the network, and gives NumPy arrays for others to be sent.
`fetch`, `check` and `write` are `dmnist data fetch`, `check` and `generate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from . import decode, idx, locate
from . import download as downloading
from .catalog import DIGITS, ENTRIES, MNIST_NAMES, ROLES, Entry, Role, require_name
from .download import Progress, silent
from .idx import one_line
from .locate import Found, NotFoundError

DRAWN = "drawn by the program"

_DRAW_BLOCK = 1024  # images between two reports of progress
_COUNT_BLOCK = 1 << 22  # pixels; `bincount` needs eight bytes for each of them


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a training and a test split; all arrays are C-contiguous and writable."""

    name: str
    train_images: NDArray[np.uint8]  # (n, 28, 28)
    train_labels: NDArray[np.uint8]  # (n,), below len(class_names)
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    mean: float  # of the training pixels divided by 255
    std: float
    source: str  # for humans: the folder, or who drew it and why

    def arrays(self) -> dict[Role, NDArray[np.uint8]]:
        """The four arrays by role."""
        return {
            "train_images": self.train_images,
            "train_labels": self.train_labels,
            "test_images": self.test_images,
            "test_labels": self.test_labels,
        }


@dataclass(frozen=True)
class Finding:
    """What `check` has to say about one file."""

    path: Path
    rows: int | None  # None: not readable
    sha256: str | None  # of the content, unpacked
    ok: bool
    verdict: str  # "ok", "ok (no published checksum)", or what is wrong


def load(
    name: str,
    root: Path,
    *,
    download: bool = True,
    seed: int = 0,
    train_size: int = 60_000,
    test_size: int = 10_000,
    mirrors: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Dataset:
    """The data set `name`, found under `root`, else downloaded to there if `download` allows.

    `seed`, `train_size` and `test_size` are for generated digits. `mirrors` are base addresses to ask
    instead of the published ones. Raises UsageError for an unknown name, DataError for a set that is not
    there and not to be had, damaged, or not what its name says. `auto` draws digits only where none of
    MNIST's files is: one that is there was put there to be used.
    """
    if name == "generated":
        return _generated(seed, train_size, test_size, DRAWN, progress)
    try:
        found = _obtain(_entry(name), root, download, mirrors, progress)
    except NotFoundError as error:
        if name != "auto":
            raise
        if error.partly:
            raise DataError(
                f"{error}; --dataset auto draws digits only where none of MNIST's files is"
            ) from error
        why = f"{DRAWN}: MNIST is not in {one_line(root)} and cannot be downloaded"
        return _generated(seed, train_size, test_size, why, progress)
    return _decoded(_entry(name), found)


def fetch(
    name: str, root: Path, *, mirrors: Sequence[str] | None = None, progress: Progress = silent
) -> list[Path]:
    """Makes sure that the files of a data set are under `root`, and returns the four.

    Raises UsageError for a name without files, DataError for what cannot be had.
    """
    entry = _entry(name)
    try:
        found = locate.search(entry, root)
    except NotFoundError as error:
        if not entry.mirrors:
            why = f"{entry.name} stands for your own files, which cannot be downloaded"
            raise NotFoundError(f"{error}; {why}") from error
        try:
            downloading.fetch(entry, root, mirrors=mirrors, progress=progress)
        except DataError as failure:
            raise DataError(f"{entry.name} cannot be downloaded: {failure}") from failure
        found = locate.search(entry, root)
    return [found.paths[role] for role in ROLES]


def check(name: str, root: Path) -> list[Finding]:
    """Looks at every file of the data set under `root`, in every place where `load` would look.

    A file that is absent beside others of its set is a finding too. Raises UsageError for a name without
    files, DataError only when there is nothing to look at.
    """
    entry = _entry(name)
    locate.require_folder(entry, root)
    findings: list[Finding] = []
    for folder in locate.folders(entry, root):
        paths = locate.present(entry, folder)
        if paths:
            findings += _examined(entry, folder, paths)
    if not findings:
        locate.search(entry, root)  # says what it looked for
    return findings


def write(dataset: Dataset, folder: Path, progress: Progress = silent) -> list[Path]:
    """Writes four gzipped IDX files in MNIST's naming, which `load("idx", folder)` reads.

    Files of those names that hold something else are never replaced. Raises DataError.
    """
    there = locate.present(ENTRIES["idx"], folder)
    for role, array in dataset.arrays().items():
        if role in there and idx.digest(idx.read(there[role])) != idx.digest(array):
            raise DataError(f"{one_line(there[role])}: holds other data; give a folder without it")
    paths = {role: folder / f"{name}.gz" for role, name in zip(ROLES, MNIST_NAMES, strict=True)} | there
    done, total = 0, sum(array.nbytes for array in dataset.arrays().values())
    progress("writing files", done, total)
    for role, array in dataset.arrays().items():
        if role not in there:
            idx.write(paths[role], array)
        done += array.nbytes
        progress("writing files", done, total)
    return [paths[role] for role in ROLES]


def _entry(name: str) -> Entry:
    require_name(name, files=True)
    return ENTRIES["mnist" if name == "auto" else name]


def _obtain(
    entry: Entry, root: Path, download: bool, mirrors: Sequence[str] | None, progress: Progress
) -> Found:
    """The files, found or downloaded. Raises NotFoundError when neither works, DataError for bad ones."""
    try:
        return locate.search(entry, root)
    except NotFoundError as absent:
        if not download or not entry.mirrors:
            raise
        try:
            downloading.fetch(entry, root, mirrors=mirrors, progress=progress)
        except DataError as error:
            raise NotFoundError(f"{absent} and {error}", partly=absent.partly) from error
    return locate.search(entry, root)


def _decoded(entry: Entry, found: Found) -> Dataset:
    paths, stored = found.paths, found.arrays
    train_images = decode.images(entry, paths["train_images"], stored["train_images"])
    train_labels = decode.labels(entry, paths["train_labels"], stored["train_labels"])
    test_images = decode.images(entry, paths["test_images"], stored["test_images"])
    test_labels = decode.labels(entry, paths["test_labels"], stored["test_labels"])
    decode.require_pairs(paths["train_images"], len(train_images), paths["train_labels"], len(train_labels))
    decode.require_pairs(paths["test_images"], len(test_images), paths["test_labels"], len(test_labels))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    mean, std = entry.constants or pixel_statistics(train_images)
    return Dataset(
        name=entry.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=entry.class_names or tuple(map(str, range(classes))),
        mean=mean,
        std=std,
        source=one_line(found.folder),
    )


def _generated(seed: int, train_size: int, test_size: int, source: str, progress: Progress) -> Dataset:
    from . import generated  # noqa: PLC0415 - builds tables that other sets do not need

    if min(train_size, test_size) < 1:
        raise DataError(f"generated digits: sizes must be at least 1, not {train_size} and {test_size}")

    def draw(split: str, size: int, before: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        images = np.empty((size, decode.SIDE, decode.SIDE), np.uint8)
        labels = np.empty(size, np.uint8)
        for start in range(0, size, _DRAW_BLOCK):
            part = slice(start, min(start + _DRAW_BLOCK, size))
            images[part], labels[part] = generated.draw(part.stop - start, split, seed, start=start)
            progress("drawing digits", before + part.stop, train_size + test_size)
        return images, labels

    train_images, train_labels = draw("train", train_size, 0)
    test_images, test_labels = draw("test", test_size, train_size)
    mean, std = pixel_statistics(train_images)
    return Dataset(
        "generated", train_images, train_labels, test_images, test_labels, DIGITS, mean, std, source
    )


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and deviation of `images / 255`, from integer sums: the same to the last bit everywhere.

    `images` is a non-empty C-contiguous uint8 array of any shape. A deviation of 0 is given as 1, so that
    it can be divided by.
    """
    pixels = images.reshape(-1)
    histogram = np.zeros(256, np.int64)
    for start in range(0, pixels.size, _COUNT_BLOCK):
        histogram += np.bincount(pixels[start : start + _COUNT_BLOCK], minlength=256)
    counts: list[int] = histogram.tolist()  # Python's integers do not overflow
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    scale = 255 * pixels.size
    variance = (pixels.size * squares - total * total) / (scale * scale)
    return total / scale, math.sqrt(variance) or 1.0


def _examined(entry: Entry, folder: Path, paths: dict[Role, Path]) -> list[Finding]:
    """A finding for each of the set's four files, of which `paths` are in `folder`."""
    findings: list[Finding] = []
    rows: dict[Role, int] = {}
    for role in ROLES:
        if role not in paths:
            findings.append(Finding(folder / entry.file(role).name, None, None, False, "missing"))
            continue
        path, sha256 = paths[role], None
        try:
            array = idx.read(path)
            sha256 = idx.digest(array)
            rows[role] = len(array) if array.ndim else 1
            ok, verdict = locate.judge(entry, role, path, array)
            if role in ("train_images", "test_images"):
                decode.images(entry, path, array)
            else:
                decode.labels(entry, path, array)
                images: Role = "train_images" if role == "train_labels" else "test_images"
                if images in rows:
                    decode.require_pairs(paths[images], rows[images], path, rows[role])
        except DataError as error:
            ok, verdict = False, str(error).removeprefix(f"{one_line(path)}: ")
        findings.append(Finding(path, rows.get(role), sha256, ok, verdict))
    return findings
