"""List the data sets that come as files: file names, checksums, mirrors and classes.

Addresses and MD5s (of the `.gz` files) are those of torchvision's `datasets/mnist.py`. MNIST's files are
identified by the SHA-256 of their unpacked content instead, because its mirrors compress them differently.
This module is only the table; `locate`, `download` and `datasets` use it.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..common.suggest import unknown
from ..errors import UsageError

Role = Literal["train_images", "train_labels", "test_images", "test_labels"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Published:
    """One of a data set's four files."""

    name: str  # as torchvision unpacks it; with `.gz` it is the name on the server
    gz_md5: str | None = None
    sha256: str | None = None  # of the content, unpacked

    def spellings(self) -> tuple[str, ...]:
        """Return all names in use: published, `idx4` for colour, `test` for `t10k`, Kaggle's `.idx3`.

        Each is there raw and with `.gz`.
        """
        names = [self.name, self.name.replace("-idx3-", "-idx4-")]
        names += [name.replace("t10k-", "test-") for name in names]
        names += [name.replace("-idx", ".idx") for name in names]
        return tuple(spelling for name in dict.fromkeys(names) for spelling in (name, f"{name}.gz"))


@dataclass(frozen=True)
class Entry:
    """One data set."""

    name: str
    folder: str  # torchvision's: the files are in <root>/<folder>/raw
    files: tuple[Published, ...]  # in the order of ROLES
    mirrors: tuple[str, ...] = ()  # base addresses, in the order in which they are tried
    class_names: tuple[str, ...] = ()  # empty: the highest label determines the number of classes
    first_label: int = 0  # the label of the first class in the files
    label_columns: int = 1  # if more than 1, the labels are a table with the class in its first column
    transposed: bool = False  # rows and columns of the stored images are swapped
    archive: str | None = None  # the zip on the server that holds the files as `gzip/<name>.gz`
    archive_md5: str | None = None
    constants: tuple[float, float] | None = None  # the usual mean and standard deviation of the pixels

    def file(self, role: Role) -> Published:
        """Return the published file with this role."""
        return self.files[ROLES.index(role)]

    @property
    def shares_names(self) -> bool:
        """Whether other data sets use the same file names, so that a name does not identify the set."""
        return self.files[0].name == MNIST_NAMES[0]


def _names(prefix: str = "", test: str = "test", labels: str = "labels-idx1-ubyte") -> tuple[str, ...]:
    """Return the names of a data set's files, in the order of ROLES."""
    parts = ("images-idx3-ubyte", labels)
    return tuple(f"{prefix}{split}-{part}" for split in ("train", test) for part in parts)


MNIST_NAMES = _names(test="t10k")
DIGITS = tuple(string.digits)
MNIST_CONSTANTS = (0.1307, 0.3081)
"""Mean and standard deviation of MNIST's training pixels, rounded as is usual."""
_NO_CHECKSUMS = (None, None, None, None)


def _files(
    names: tuple[str, ...],
    *,
    gz_md5: tuple[str | None, ...] = _NO_CHECKSUMS,
    sha256: tuple[str | None, ...] = _NO_CHECKSUMS,
) -> tuple[Published, ...]:
    return tuple(Published(*columns) for columns in zip(names, gz_md5, sha256, strict=True))


def _emnist(split: str, class_names: tuple[str, ...], first_label: int = 0) -> Entry:
    return Entry(
        name=f"emnist-{split}",
        folder="EMNIST",
        files=_files(_names(f"emnist-{split}-")),
        mirrors=("https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",),
        class_names=class_names,
        first_label=first_label,
        transposed=True,
        archive="gzip.zip",
        archive_md5="58c8d27c78d21e728a6bc7b3cc06412e",
    )


_UPPER = tuple(string.ascii_uppercase)
_LOWER = tuple(string.ascii_lowercase)
# EMNIST merges the two cases of a letter into the upper case where they look alike.
_MERGED = (*DIGITS, *_UPPER, *"abdefghnqrt")

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="mnist",
            folder="MNIST",
            files=_files(
                MNIST_NAMES,
                sha256=(
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                ),
            ),
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                "http://yann.lecun.com/exdb/mnist/",  # last: it has answered 403 or 503 for years
            ),
            class_names=DIGITS,
            constants=MNIST_CONSTANTS,
        ),
        Entry(
            name="fashion-mnist",
            folder="FashionMNIST",
            files=_files(
                MNIST_NAMES,
                gz_md5=(
                    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "25c81989df183df01b3e8a0aad5dffbe",
                    "bef4ecab320f06d8554ea6380940ec79",
                    "bb300cfdad3c16e7a12a480ee83cd310",
                ),
            ),
            mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            class_names=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
        ),
        Entry(
            name="kmnist",
            folder="KMNIST",
            files=_files(
                MNIST_NAMES,
                gz_md5=(
                    "bdb82020997e1d708af4cf47b453dcf7",
                    "e144d726b3acfaa3e44228e80efcd344",
                    "5c965bf0a639b31b8f53240b1b52f4d7",
                    "7320c461ea6c1c855c0b718fb2a4b134",
                ),
            ),
            mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
            class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        ),
        Entry(
            name="qmnist",
            folder="QMNIST",
            files=_files(
                _names("qmnist-", labels="labels-idx2-int"),
                gz_md5=(
                    "ed72d4157d28c017586c42bc6afe6370",
                    "0058f8dd561b90ffdd0f734c6a30e5e4",
                    "1394631089c404de565df7b7aeaf9412",
                    "5b5b05890a5e13444e108efe57b788aa",
                ),
            ),
            mirrors=("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",),
            class_names=DIGITS,
            label_columns=8,
        ),
        _emnist("byclass", (*DIGITS, *_UPPER, *_LOWER)),
        _emnist("bymerge", _MERGED),
        _emnist("balanced", _MERGED),
        _emnist("letters", _LOWER, first_label=1),
        _emnist("digits", DIGITS),
        _emnist("mnist", DIGITS),
        # The user's own files under MNIST's names: no mirror, and no published checksum.
        Entry(name="idx", folder="MNIST", files=_files(MNIST_NAMES)),
    )
}

NAMES = (*ENTRIES, "generated", "auto")
"""All names of data sets; `auto` is MNIST if it can be found or downloaded, else generated digits."""


def require_name(name: str, *, files: bool = False) -> None:
    """Raise `UsageError`, which lists the names, if there is no data set `name`.

    With `files`, also raise it for generated digits, which have no files.
    """
    if files and name == "generated":
        raise UsageError("generated digits have no files: they are generated when they are needed")
    if name not in NAMES:
        if Path(name).is_dir():
            raise UsageError(f"there is no data set {name!r}: for your own files, use idx --data {name}")
        raise UsageError(unknown("data set", name, NAMES))
