"""Put a training and a test part together: one size, one list of classes, labels that count from 0."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common import random_keys
from ..data.catalog import ENTRIES, ROLES, Role
from ..data.decode import MAX_CLASSES
from ..data.idx import digest
from ..errors import DataError
from .part import Part, widened

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Assembled:
    """A whole data set, ready to be written."""

    arrays: dict[Role, NDArray[np.uint8]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # for people: what was converted

    def names_to_write(self) -> tuple[str, ...]:
        """Return the names of the classes, or none if they are called 0, 1, 2, ... anyway."""
        highest = max(int(self.arrays["train_labels"].max()), int(self.arrays["test_labels"].max()))
        return () if self.class_names == tuple(map(str, range(highest + 1))) else self.class_names

    def known_as(self) -> str | None:
        """Return the name of the data set in the catalog with exactly this content, if there is one."""
        sha256 = {role: digest(array) for role, array in self.arrays.items()}
        return next(
            (e.name for e in ENTRIES.values() if all(e.file(r).sha256 == sha256[r] for r in ROLES)), None
        )


def split_off(part: Part, fraction: float) -> tuple[Part, Part]:
    """Return a training and a test part of one part; the same images always go to the test part.

    Raises DataError if either would be empty.
    """
    count = len(part.images)
    size = round(count * fraction)
    if not 0 < size < count:
        raise DataError(
            f"--test-fraction {fraction} of {count} images leaves one of the parts without images"
        )
    chosen = np.zeros(count, bool)
    chosen[random_keys.permutation(count, "test part")[:size]] = True
    assert part.labels is not None
    train, test = (
        Part(part.images[rows], part.labels[rows], part.class_names, part.note)
        for rows in (~chosen, chosen)
    )
    return train, test


def assemble(train: Part, test: Part) -> Assembled:
    """Return the data set of two parts with labels. Raises DataError if they do not fit together."""
    assert train.labels is not None and test.labels is not None
    train_images, test_images = train.images, test.images
    if train_images.ndim != test_images.ndim:
        train_images, test_images = (
            images if images.ndim == 4 else widened(images) for images in (train_images, test_images)
        )
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = [f"{images.shape[2]} x {images.shape[1]}" for images in (train_images, test_images)]
        raise DataError(f"the training images have {sizes[0]} pixels, the test images {sizes[1]}")
    notes = [note for note in dict.fromkeys([train.note, test.note]) if note]
    test_labels = _by_name(test, train.class_names)
    names, labels = train.class_names, (train.labels, test_labels)
    if not names:
        names, labels = _count_from_zero(*labels)
        if labels[0] is not train.labels:
            notes.append(f"the labels are {_brief(names)}, and were numbered from 0")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{len(names)} classes are more than {MAX_CLASSES}")
    bytes_of = [label.astype(np.uint8) for label in labels]
    arrays = (train_images, bytes_of[0], test_images, bytes_of[1])
    return Assembled(dict(zip(ROLES, arrays, strict=True)), names, tuple(notes))


def _by_name(test: Part, names: tuple[str, ...]) -> Labels:
    """Return the test labels as indices of the training part's names."""
    assert test.labels is not None
    if test.class_names == names or not names or not test.class_names:
        return test.labels
    present = [test.class_names[label] for label in np.unique(test.labels)]
    if lacking := [name for name in present if name not in names]:
        raise DataError(f"the test part has the classes {_brief(lacking)}, which the training part lacks")
    index = [names.index(name) if name in names else 0 for name in test.class_names]
    return np.array(index)[test.labels]


def _count_from_zero(train: Labels, test: Labels) -> tuple[tuple[str, ...], tuple[Labels, Labels]]:
    """Return names of classes, and labels that count from 0.

    Labels with a 0 stay as they are. Others, such as 1 to 26, are numbered in their order.
    """
    present = np.union1d(train, test)
    if present[0] == 0 and present[-1] < MAX_CLASSES:
        return tuple(map(str, range(int(present[-1]) + 1))), (train, test)
    numbered = (np.searchsorted(present, train), np.searchsorted(present, test))
    return tuple(map(str, present.tolist())), numbered


def _brief(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names if len(names) < 7 else (*names[:3], "...", names[-1]))
