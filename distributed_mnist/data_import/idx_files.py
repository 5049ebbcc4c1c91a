"""IDX files under the names of a known data set, such as those in Kaggle's `emnist_source_files`."""

from pathlib import Path

from ..data import decode, idx
from ..data.catalog import ENTRIES, Entry
from ..data.idx import one_line
from .part import Part, PartName, Progress, make_part


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read a file of images and a file of labels. EMNIST's images are turned upright."""
    images_path, labels_path = paths
    entry = _entry(images_path.name)
    progress("reading files", 0, None)
    stored = idx.read(images_path), idx.read(labels_path)
    where = one_line(images_path)
    if entry.name == "idx":
        return make_part(where, *stored)
    return make_part(
        where,
        decode.images(entry, images_path, stored[0]),
        decode.labels(entry, labels_path, stored[1]),
        entry.class_names,
        f"{entry.name}: turned upright" if entry.transposed else "",
    )


def _entry(name: str) -> Entry:
    """Return the data set that has a file of this name; `idx` for MNIST's names, which several share."""
    for entry in ENTRIES.values():
        names = [spelling for file in entry.files for spelling in file.spellings()]
        if not entry.shares_names and name in names:
            return entry
    return ENTRIES["idx"]
