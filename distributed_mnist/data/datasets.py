"""Load data sets by name: `load("mnist", Path("data"))` finds, downloads or draws one and checks it.

Only one process should call this: it uses files and the network, and returns NumPy arrays that can be sent
to others. `fetch`, `check` and `write` implement `dmnist data fetch`, `check` and `generate`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import MNIST_SHAPE, ImageShape, shape_of
from ..errors import DataError
from . import class_names, decode, idx, locate
from . import download as downloading
from .catalog import DIGITS, ENTRIES, MNIST_NAMES, ROLES, Entry, Role, require_name
from .download import Progress, silent
from .idx import one_line
from .locate import FoundFiles, NotFoundError

DRAWN = "drawn by the program"
IMAGES_OF: dict[Role, Role] = {"train_labels": "train_images", "test_labels": "test_images"}

_DRAW_BLOCK = 1024  # images between two progress reports
_COUNT_BLOCK = 1 << 22  # pixels; `bincount` needs eight bytes for each


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a training and a test split; all arrays are C-contiguous and writable."""

    name: str
    train_images: NDArray[np.uint8]  # (n, h, w), or in colour (n, h, w, 3)
    train_labels: NDArray[np.uint8]  # (n,), below len(class_names)
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    mean: float  # of the training pixels divided by 255
    std: float
    source: str  # for people: the folder, or that the program drew it and why

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of an image."""
        return shape_of(self.train_images.shape)

    def __repr__(self) -> str:
        images = f"{len(self.train_images):,} + {len(self.test_images):,} images"
        return f"<Dataset: {self.name}, {images}, {len(self.class_names)} classes, {self.source}>"

    def arrays(self) -> dict[Role, NDArray[np.uint8]]:
        """Return the four arrays by role."""
        return {role: getattr(self, role) for role in ROLES}


@dataclass(frozen=True)
class FileCheck:
    """The result of `check` for one file."""

    path: Path
    rows: int | None  # None: missing or not readable
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
    """Load the data set `name` from `root`; with `download`, download it to there if it is missing.

    `seed`, `train_size` and `test_size` are for generated digits. `mirrors` are base addresses that replace
    the published ones. `auto` generates digits only if no file of MNIST exists, because an existing file is
    meant to be used. Raises UsageError for an unknown name, and DataError for a set that cannot be found
    or downloaded, is damaged, or does not match its name.
    """
    if name == "generated":
        return _draw(seed, train_size, test_size, DRAWN, progress)
    entry = _entry(name)
    try:
        found = _find_or_download(entry, root, mirrors, progress) if download else locate.find(entry, root)
    except NotFoundError as error:
        if name != "auto":
            raise
        if error.incomplete:
            raise DataError(
                f"{error}; --dataset auto generates digits only if none of MNIST's files exist"
            ) from error
        why = f"{DRAWN}: MNIST is not in {one_line(root)} and cannot be downloaded"
        return _draw(seed, train_size, test_size, why, progress)
    return _decode(entry, found)


def fetch(
    name: str, root: Path, *, mirrors: Sequence[str] | None = None, progress: Progress = silent
) -> list[Path]:
    """Download the files of a data set unless they are under `root`, and return the paths of the four.

    Raises UsageError for a name without files, and DataError if the files cannot be found or downloaded.
    """
    found = _find_or_download(_entry(name), root, mirrors, progress)
    return [found.paths[role] for role in ROLES]


def check(name: str, root: Path) -> list[FileCheck]:
    """Check every file of the data set under `root`, in every folder where `load` would look.

    If some files of a set exist, the result includes the missing ones. Raises UsageError for a name without
    files, and DataError only if there are no files at all.
    """
    entry = _entry(name)
    locate.require_folder(entry, root)
    checks: list[FileCheck] = []
    for folder in locate.candidate_folders(entry, root):
        paths = locate.existing_files(entry, folder)
        if paths:
            checks += _check_files(entry, folder, paths)
    if not checks:
        locate.find(entry, root)  # raises NotFoundError, which says what is missing
    return checks


def write(dataset: Dataset, folder: Path, progress: Progress = silent) -> list[Path]:
    """Write a data set's images and labels as `write_arrays` does."""
    return write_arrays(dataset.arrays(), folder, progress)


def write_arrays(
    arrays: Mapping[Role, NDArray[np.uint8]],
    folder: Path,
    progress: Progress = silent,
    *,
    names: tuple[str, ...] = (),
) -> list[Path]:
    """Write four gzipped IDX files under MNIST's names, which `load("idx", folder)` reads.

    Colour images have four dimensions, so `idx4` is in their names instead of `idx3`.

    `names` are those of the classes, if they are not 0, 1, 2, ... Never replaces an existing file that
    holds something else. If it fails, it removes what it wrote. Raises DataError.
    """
    existing = locate.existing_files(ENTRIES["idx"], folder)
    for role, array in arrays.items():
        if role in existing and idx.digest(idx.read(existing[role])) != idx.digest(array):
            raise DataError(f"{one_line(existing[role])}: holds other data; give a folder without it")
    named = class_names.read(folder)
    if named not in (None, names):
        path = one_line(folder / class_names.FILE)
        raise DataError(f"{path}: holds other names; give a folder without it")
    dimensions = f"idx{arrays['train_images'].ndim}"
    files = [f"{name.replace('idx3', dimensions)}.gz" for name in MNIST_NAMES]
    paths = {role: folder / name for role, name in zip(ROLES, files, strict=True)} | existing
    done, total = 0, sum(array.nbytes for array in arrays.values())
    progress("writing files", done, total)
    written: list[Path] = []
    try:
        if names and not named:
            written.append(class_names.write(folder, names))
        for role, array in arrays.items():
            if role not in existing:
                idx.write(paths[role], array)
                written.append(paths[role])
            done += array.nbytes
            progress("writing files", done, total)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return [paths[role] for role in ROLES]


def _entry(name: str) -> Entry:
    require_name(name, files=True)
    return ENTRIES["mnist" if name == "auto" else name]


def _find_or_download(
    entry: Entry, root: Path, mirrors: Sequence[str] | None, progress: Progress
) -> FoundFiles:
    """Find the files, or else download them.

    Raises NotFoundError if neither works, and DataError for files that cannot be used.
    """
    try:
        return locate.find(entry, root)
    except NotFoundError as error:
        if not entry.mirrors:
            why = f"{entry.name} stands for your own files, which cannot be downloaded"
            raise NotFoundError(f"{error}; {why}", incomplete=error.incomplete) from error
        try:
            downloading.fetch(entry, root, mirrors=mirrors, progress=progress)
        except DataError as failure:
            raise NotFoundError(f"{error} and {failure}", incomplete=error.incomplete) from failure
    return locate.find(entry, root)


def _decode(entry: Entry, found: FoundFiles) -> Dataset:
    paths = found.paths
    arrays = {role: decode.content(entry, role, paths[role], found.arrays[role]) for role in ROLES}
    for labels, images in IMAGES_OF.items():
        decode.require_pairs(paths[images], len(arrays[images]), paths[labels], len(arrays[labels]))
    train, test = "train_images", "test_images"
    decode.require_same_shape(
        arrays[train], one_line(paths[train].name), arrays[test], one_line(paths[test])
    )
    if not entry.class_names:
        decode.require_from_zero(arrays["train_labels"], one_line(paths["train_labels"]))
    classes = int(max(arrays["train_labels"].max(), arrays["test_labels"].max())) + 1
    names = entry.class_names or tuple(map(str, range(classes)))
    if entry.name == "idx" and (own := class_names.read(found.folder)):
        if len(own) < classes:
            path = one_line(found.folder / class_names.FILE)
            raise DataError(f"{path}: has {len(own)} names, but there is a label {classes - 1}")
        names = own
    mean, std = entry.constants or pixel_statistics(arrays["train_images"])
    return Dataset(
        name=entry.name,
        **arrays,
        class_names=names,
        mean=mean,
        std=std,
        source=one_line(found.folder),
    )


def _draw(seed: int, train_size: int, test_size: int, source: str, progress: Progress) -> Dataset:
    from . import generated  # noqa: PLC0415 - the import builds tables that other sets do not need

    if min(train_size, test_size) < 1:
        raise DataError(f"generated digits: sizes must be at least 1, not {train_size} and {test_size}")

    def draw_split(split: str, size: int, before: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        images = np.empty((size, *MNIST_SHAPE[1:]), np.uint8)
        labels = np.empty(size, np.uint8)
        for start in range(0, size, _DRAW_BLOCK):
            stop = min(start + _DRAW_BLOCK, size)
            images[start:stop], labels[start:stop] = generated.draw(stop - start, split, seed, start=start)
            progress("generating digits", before + stop, train_size + test_size)
        return images, labels

    train, test = draw_split("train", train_size, 0), draw_split("test", test_size, train_size)
    return Dataset("generated", *train, *test, DIGITS, *pixel_statistics(train[0]), source)


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Return mean and standard deviation of `images / 255`.

    Both come from integer sums, so they are the same to the last bit everywhere. `images` is a non-empty
    C-contiguous uint8 array of any shape. A deviation of 0 is returned as 1, so that it can be a divisor.
    """
    pixels = images.reshape(-1)
    histogram = np.zeros(256, np.int64)
    for start in range(0, pixels.size, _COUNT_BLOCK):
        histogram += np.bincount(pixels[start : start + _COUNT_BLOCK], minlength=256)
    counts: list[int] = histogram.tolist()  # Python integers do not overflow
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    scale = 255 * pixels.size
    variance = (pixels.size * squares - total * total) / (scale * scale)
    return total / scale, math.sqrt(variance) or 1.0


def _check_files(entry: Entry, folder: Path, paths: dict[Role, Path]) -> list[FileCheck]:
    """Check each of the set's four files; `paths` are those that exist in `folder`."""
    checks: list[FileCheck] = []
    rows: dict[Role, int] = {}
    train: NDArray[np.uint8] | None = None  # the training images, if they can be used
    for role in ROLES:
        if role not in paths:
            checks.append(FileCheck(folder / entry.file(role).name, None, None, False, "missing"))
            continue
        path, sha256 = paths[role], None
        try:
            array = idx.read(path)
            sha256 = idx.digest(array)
            rows[role] = len(array) if array.ndim else 1
            ok, verdict = locate.verify(entry, role, path, array)
            content = decode.content(entry, role, path, array)
            if (images := IMAGES_OF.get(role)) in rows:
                decode.require_pairs(paths[images], rows[images], path, rows[role])
            if role == "test_images" and train is not None:
                decode.require_same_shape(
                    train, one_line(paths["train_images"].name), content, one_line(path)
                )
            train = content if role == "train_images" else train
        except DataError as error:
            ok, verdict = False, str(error).removeprefix(f"{one_line(path)}: ")
        checks.append(FileCheck(path, rows.get(role), sha256, ok, verdict))
    return checks
