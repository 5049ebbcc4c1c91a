"""The data sets that come as files: what the files are called, their checksums, mirrors and classes.

Addresses and MD5s (of the `.gz` files) are those of torchvision's `datasets/mnist.py`. MNIST's files are
known by the SHA-256 of their content instead, because its mirrors compress them differently. A table and
the names in it: what is done with it is in `locate`, `download` and `datasets`.
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
        """Its names on people's disks: as published, `test` for `t10k`, Kaggle's `.idx3`; raw and `.gz`."""
        names = [self.name, self.name.replace("t10k-", "test-")]
        names += [name.replace("-idx", ".idx") for name in names]
        return tuple(spelling for name in dict.fromkeys(names) for spelling in (name, f"{name}.gz"))


Files = tuple[Published, Published, Published, Published]  # in the order of ROLES


@dataclass(frozen=True)
class Entry:
    """One data set."""

    name: str
    folder: str  # torchvision's: the files are in <root>/<folder>/raw
    files: Files
    mirrors: tuple[str, ...] = ()  # base addresses, in the order in which they are tried
    class_names: tuple[str, ...] = ()  # none: the labels say how many there are
    first_label: int = 0  # what the files call class 0
    label_columns: int = 1  # more: the labels are a table with the class in its first column
    transposed: bool = False  # rows and columns of the stored images are swapped
    archive: str | None = None  # the zip on the server that holds the files as `gzip/<name>.gz`
    archive_md5: str | None = None
    constants: tuple[float, float] | None = None  # mean and deviation that the field has agreed on

    def file(self, role: Role) -> Published:
        """The published file of this part of the set."""
        return self.files[ROLES.index(role)]

    @property
    def shares_names(self) -> bool:
        """Whether other data sets have files of the same names, so that a name proves nothing."""
        return self.files[0].name == MNIST_NAMES[0]


MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS = tuple(string.digits)
MNIST_CONSTANTS = (0.1307, 0.3081)
"""Mean and deviation of MNIST's training pixels, as the field rounds them."""


def _by_md5(names: tuple[str, ...], *md5s: str) -> Files:
    a, b, c, d = (Published(name, gz_md5=md5) for name, md5 in zip(names, md5s, strict=True))
    return a, b, c, d


def _by_sha256(names: tuple[str, ...], *digests: str) -> Files:
    a, b, c, d = (Published(name, sha256=digest) for name, digest in zip(names, digests, strict=True))
    return a, b, c, d


def _plain(*names: str) -> Files:
    a, b, c, d = map(Published, names)
    return a, b, c, d


def _emnist(split: str, class_names: tuple[str, ...], first_label: int = 0) -> Entry:
    return Entry(
        name=f"emnist-{split}",
        folder="EMNIST",
        files=_plain(
            f"emnist-{split}-train-images-idx3-ubyte",
            f"emnist-{split}-train-labels-idx1-ubyte",
            f"emnist-{split}-test-images-idx3-ubyte",
            f"emnist-{split}-test-labels-idx1-ubyte",
        ),
        mirrors=("https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",),
        class_names=class_names,
        first_label=first_label,
        transposed=True,
        archive="gzip.zip",
        archive_md5="58c8d27c78d21e728a6bc7b3cc06412e",
    )


_UPPER = tuple(string.ascii_uppercase)
_LOWER = tuple(string.ascii_lowercase)
# Where a letter's two cases look alike EMNIST merges them into the upper one.
_MERGED = (*DIGITS, *_UPPER, *"abdefghnqrt")

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="mnist",
            folder="MNIST",
            files=_by_sha256(
                MNIST_NAMES,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                "http://yann.lecun.com/exdb/mnist/",  # has answered 403 or 503 for years: last
            ),
            class_names=DIGITS,
            constants=MNIST_CONSTANTS,
        ),
        Entry(
            name="fashion-mnist",
            folder="FashionMNIST",
            files=_by_md5(
                MNIST_NAMES,
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
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
            files=_by_md5(
                MNIST_NAMES,
                "bdb82020997e1d708af4cf47b453dcf7",
                "e144d726b3acfaa3e44228e80efcd344",
                "5c965bf0a639b31b8f53240b1b52f4d7",
                "7320c461ea6c1c855c0b718fb2a4b134",
            ),
            mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
            class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        ),
        Entry(
            name="qmnist",
            folder="QMNIST",
            files=_by_md5(
                (
                    "qmnist-train-images-idx3-ubyte",
                    "qmnist-train-labels-idx2-int",
                    "qmnist-test-images-idx3-ubyte",
                    "qmnist-test-labels-idx2-int",
                ),
                "ed72d4157d28c017586c42bc6afe6370",
                "0058f8dd561b90ffdd0f734c6a30e5e4",
                "1394631089c404de565df7b7aeaf9412",
                "5b5b05890a5e13444e108efe57b788aa",
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
        # The user's own files, in MNIST's naming: nowhere to download from, nothing to compare with.
        Entry(name="idx", folder="MNIST", files=_plain(*MNIST_NAMES)),
    )
}

NAMES = (*ENTRIES, "generated", "auto")
"""Every data set there is; `auto` is MNIST if it can be had, else generated digits."""


def require_name(name: str, *, files: bool = False) -> None:
    """Raise `UsageError`, with the names there are, for no data set; with `files` also for a drawn one."""
    if files and name == "generated":
        raise UsageError("generated digits are drawn when they are needed: they have no files")
    if name not in NAMES:
        if Path(name).is_dir():
            raise UsageError(f"there is no data set {name!r}: for a folder of your own, idx --data {name}")
        raise UsageError(unknown("data set", name, NAMES))
