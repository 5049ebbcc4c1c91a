"""Data sets: found in every layout, converted to one form, and refused with a one-line error if wrong."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import REPOSITORY

from distributed_mnist.data import catalog, datasets, generated, idx
from distributed_mnist.data.arrays import from_arrays
from distributed_mnist.data.catalog import ENTRIES, MNIST_NAMES, ROLES, Entry, Role
from distributed_mnist.errors import DataError, UsageError

Arrays = dict[Role, NDArray[Any]]


def small(classes: int = 10, train: int = 30, test: int = 20, first_label: int = 0) -> Arrays:
    """A tiny set with every class in both splits and images that are not symmetric."""
    rng = np.random.default_rng(classes + train)

    def labels(count: int) -> NDArray[np.uint8]:
        return (np.arange(count) % classes + first_label).astype(np.uint8)

    return {
        "train_images": rng.integers(0, 256, (train, 28, 28), np.uint8),
        "train_labels": labels(train),
        "test_images": rng.integers(0, 256, (test, 28, 28), np.uint8),
        "test_labels": labels(test),
    }


def put(folder: Path, entry: Entry, arrays: Arrays, suffix: str = "") -> dict[Role, Path]:
    paths: dict[Role, Path] = {role: folder / f"{entry.file(role).name}{suffix}" for role in ROLES}
    for role, path in paths.items():
        idx.write(path, arrays[role])
    return paths


def refusal(name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        datasets.load(name, root, download=False)
    assert str(caught.value).isprintable()
    return str(caught.value)


def publish(monkeypatch: pytest.MonkeyPatch, name: str, arrays: Arrays) -> None:
    """Make `arrays` the published content of `name`."""
    entry = ENTRIES[name]
    files = tuple(replace(entry.file(role), sha256=idx.digest(arrays[role])) for role in ROLES)
    monkeypatch.setitem(catalog.ENTRIES, name, replace(entry, files=files))


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """A small set that is accepted as MNIST."""
    arrays = small(train=41)
    publish(monkeypatch, "mnist", arrays)
    return arrays


@pytest.fixture(scope="module")
def real_mnist() -> Path:
    beside = REPOSITORY.parent / "shared" / "mnist"
    folder = Path(os.environ.get("DMNIST_DATA") or beside)
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"MNIST's files are not in {folder}; DMNIST_DATA names another folder")
    return folder


def test_the_table_is_complete() -> None:
    classes = {name: len(entry.class_names) for name, entry in ENTRIES.items()}
    assert classes == {
        "mnist": 10,
        "fashion-mnist": 10,
        "kmnist": 10,
        "qmnist": 10,
        "emnist-byclass": 62,
        "emnist-bymerge": 47,
        "emnist-balanced": 47,
        "emnist-letters": 26,
        "emnist-digits": 10,
        "emnist-mnist": 10,
        "idx": 0,
    }
    for name, entry in ENTRIES.items():
        assert entry.name == name
        assert len(set(entry.class_names)) == len(entry.class_names)
        assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in entry.mirrors)
        assert bool(entry.mirrors) == (name != "idx")
        for published in entry.files:
            md5, sha256 = published.gz_md5, published.sha256
            assert md5 is None or (len(md5) == 32 and int(md5, 16))
            assert sha256 is None or (len(sha256) == 64 and int(sha256, 16))
            assert bool(md5 or sha256) == (name not in ("idx",) and not entry.archive)
    assert ENTRIES["mnist"].mirrors[-1] == "http://yann.lecun.com/exdb/mnist/"
    assert "".join(ENTRIES["emnist-balanced"].class_names[36:]) == "abdefghnqrt"
    assert ENTRIES["emnist-byclass"].class_names[10] == "A"
    assert ENTRIES["emnist-byclass"].class_names[61] == "z"


def test_real_mnist(real_mnist: Path) -> None:
    loaded = datasets.load("mnist", real_mnist, download=False)
    assert loaded.train_images.shape == (60_000, 28, 28)
    assert loaded.test_images.shape == (10_000, 28, 28)
    assert np.bincount(loaded.test_labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert (loaded.name, loaded.mean, loaded.std) == ("mnist", 0.1307, 0.3081)
    assert loaded.source == str(real_mnist)
    mean, std = datasets.pixel_statistics(loaded.train_images)
    assert (round(mean, 4), round(std, 4)) == (0.1307, 0.3081)
    findings = datasets.check("mnist", real_mnist)
    assert [(finding.rows, finding.verdict) for finding in findings] == [
        (60_000, "ok"),
        (60_000, "ok"),
        (10_000, "ok"),
        (10_000, "ok"),
    ]
    assert [finding.sha256 for finding in findings] == [file.sha256 for file in ENTRIES["mnist"].files]
    assert refusal("kmnist", real_mnist).endswith("train-images-idx3-ubyte.gz: holds mnist, not kmnist)")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in ("idx", "qmnist")])
def test_torchvisions_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    entry = ENTRIES[name]
    arrays = small(len(entry.class_names), train=70, test=65, first_label=entry.first_label)
    if name == "mnist":
        publish(monkeypatch, name, arrays)
    folder = tmp_path / entry.folder / "raw"
    put(folder, entry, arrays, suffix)
    for root in (tmp_path, tmp_path / entry.folder, folder):
        loaded = datasets.load(name, root, download=False)
        assert loaded.name == name
        assert loaded.source == str(folder)
        assert loaded.class_names == entry.class_names
        for role, array in loaded.arrays().items():
            expected = arrays[role]
            if entry.transposed and expected.ndim == 3:
                expected = expected.transpose(0, 2, 1)
            if expected.ndim == 1:
                expected = expected - entry.first_label
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == np.uint8
            assert array.flags.c_contiguous
            assert array.flags.writeable


def test_emnists_gzip_folder(tmp_path: Path) -> None:
    entry = ENTRIES["emnist-letters"]
    put(tmp_path / "EMNIST/raw/gzip", entry, small(26, first_label=1), ".gz")
    loaded = datasets.load("emnist-letters", tmp_path, download=False)
    assert loaded.class_names[int(loaded.train_labels[0])] == "a"


def test_qmnist_takes_the_class_from_the_first_column(tmp_path: Path) -> None:
    arrays = small()
    stored = dict(arrays)
    for role in ROLES[1::2]:
        table = np.full((len(arrays[role]), 8), 999_999, np.int32)
        table[:, 0] = arrays[role]
        stored[role] = table
    paths = put(tmp_path / "QMNIST/raw", ENTRIES["qmnist"], stored)
    loaded = datasets.load("qmnist", tmp_path, download=False)
    np.testing.assert_array_equal(loaded.test_labels, arrays["test_labels"])
    assert loaded.test_labels.flags.c_contiguous
    idx.write(paths["train_labels"], arrays["train_labels"])
    expected = f"{paths['train_labels']}: holds uint8 (30), labels are integers (n, 8)"
    assert refusal("qmnist", tmp_path) == expected


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("t10k-", "test-"),
        lambda name: name.replace("-idx", ".idx"),
        lambda name: name.replace("t10k-", "test-") + ".gz",
    ],
)
def test_other_spellings_are_found(tmp_path: Path, rename: Callable[[str], str]) -> None:
    arrays = small()
    for role, name in zip(ROLES, MNIST_NAMES, strict=True):
        idx.write(tmp_path / rename(name), arrays[role])
    loaded = datasets.load("idx", tmp_path, download=False)
    np.testing.assert_array_equal(loaded.test_images, arrays["test_images"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_in_a_plain_folder_is_identified_by_its_content(
    tmp_path: Path, mnist: Arrays, suffix: str
) -> None:
    put(tmp_path, ENTRIES["mnist"], mnist, suffix)
    assert datasets.load("mnist", tmp_path, download=False).source == str(tmp_path)
    assert datasets.load("auto", tmp_path, download=False).name == "mnist"


@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_other_content_under_mnists_names_is_refused(
    tmp_path: Path, mnist: Arrays, folder: str, name: str
) -> None:
    other = mnist.copy()
    other["test_labels"] = mnist["test_labels"][::-1].copy()
    paths = put(tmp_path / folder, ENTRIES["mnist"], other)
    found, expected = (idx.digest(arrays["test_labels"])[:12] for arrays in (other, mnist))
    assert refusal(name, tmp_path) == (
        f"{paths['test_labels']}: checksum mismatch: the content's SHA-256 is {found}…, mnist's is "
        f"{expected}…; --dataset idx takes files as they are"
    )
    assert datasets.load("idx", tmp_path, download=False).name == "idx"


@pytest.mark.parametrize("folder", [".", "KMNIST/raw"])
def test_mnist_is_not_accepted_as_another_set(tmp_path: Path, mnist: Arrays, folder: str) -> None:
    paths = put(tmp_path / folder, ENTRIES["mnist"], mnist)
    assert f"{paths['train_images']}: holds mnist, not kmnist" in refusal("kmnist", tmp_path)


def test_files_of_another_set_are_identified_by_their_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = put(tmp_path, ENTRIES["kmnist"], small(), ".gz")
    files = tuple(
        replace(ENTRIES["kmnist"].file(role), gz_md5=hashlib.md5(path.read_bytes()).hexdigest())
        for role, path in paths.items()
    )
    assert "checksum mismatch: its MD5 is" in refusal("kmnist", tmp_path)
    monkeypatch.setitem(catalog.ENTRIES, "kmnist", replace(ENTRIES["kmnist"], files=files))
    assert datasets.load("kmnist", tmp_path, download=False).name == "kmnist"
    assert [finding.verdict for finding in datasets.check("kmnist", tmp_path)] == ["ok"] * 4
    assert "holds kmnist, not fashion-mnist" in refusal("fashion-mnist", tmp_path)
    assert "(it holds kmnist)" in refusal("mnist", tmp_path)


@pytest.mark.parametrize(
    "folder", ["fashion-mnist", "Fashion_MNIST/raw", "FashionMNIST", "FashionMNIST/raw"]
)
def test_unknown_unpacked_files_are_accepted_in_a_folder_of_their_name(tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder, ENTRIES["fashion-mnist"], small())
    root = tmp_path / folder.removesuffix("FashionMNIST/raw")
    assert datasets.load("fashion-mnist", root, download=False).class_names[9] == "Ankle boot"
    verdicts = {finding.verdict for finding in datasets.check("fashion-mnist", root)}
    assert verdicts == {"ok (no published checksum)"}


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_unknown_unpacked_files_in_a_plain_folder_may_be_any_sets(tmp_path: Path, name: str) -> None:
    paths = put(tmp_path, ENTRIES["idx"], small())
    folder = ENTRIES[name].folder
    assert (
        f"{paths['train_images']}: any set's file may have this name, and no checksum of it is known; "
        f"in a folder {folder}/raw or {name} it would be accepted without this check"
    ) in refusal(name, tmp_path)
    assert datasets.load("idx", tmp_path, download=False).name == "idx"


def test_labels_that_begin_at_1_are_a_mistake(tmp_path: Path) -> None:
    arrays = small(first_label=1)
    paths = put(tmp_path, ENTRIES["idx"], arrays)
    text = "labels from 1 to 10, but they count from 0: subtract 1 from each"
    assert refusal("idx", tmp_path) == f"{paths['train_labels']}: {text}"
    own: dict[str, Any] = {**arrays}
    with pytest.raises(DataError, match=f"^train_labels: {text}$"):
        from_arrays(**own)
    names = [*"0123456789", "ten"]  # an empty class 0 is meant
    assert len(from_arrays(**own, class_names=names).class_names) == 11
    gaps = {**own, "train_labels": arrays["train_labels"] + (arrays["train_labels"] > 4)}
    assert len(from_arrays(**gaps).class_names) == 12


def test_the_users_own_files(tmp_path: Path) -> None:
    arrays = small(classes=17)
    put(tmp_path, ENTRIES["idx"], arrays, ".gz")
    put(tmp_path / "MNIST/raw", ENTRIES["idx"], small(classes=3))  # those in the named folder go first
    loaded = datasets.load("idx", tmp_path)
    assert loaded.class_names == tuple(map(str, range(17)))
    np.testing.assert_array_equal(loaded.train_images, arrays["train_images"])


def test_classes_are_counted_over_both_splits(tmp_path: Path) -> None:
    arrays = small()
    arrays["test_labels"] = np.full(20, 255, np.uint8)
    put(tmp_path, ENTRIES["idx"], arrays)
    assert len(datasets.load("idx", tmp_path).class_names) == 256


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4"])
def test_labels_of_other_integer_types_are_accepted(tmp_path: Path, dtype: str) -> None:
    arrays = small()
    expected = arrays["train_labels"]
    arrays["train_labels"] = expected.astype(dtype)
    put(tmp_path, ENTRIES["idx"], arrays)
    loaded = datasets.load("idx", tmp_path)
    np.testing.assert_array_equal(loaded.train_labels, expected)
    assert loaded.train_labels.dtype == np.uint8


BAD: list[tuple[Role, NDArray[Any], str]] = [
    (
        "train_images",
        np.zeros((30, 27, 28), "u1"),
        "holds uint8 (30, 27, 28), images are uint8 (n, 28, 28)",
    ),
    ("train_images", np.zeros((30, 784), "u1"), "holds uint8 (30, 784), images are uint8 (n, 28, 28)"),
    (
        "train_images",
        np.zeros((30, 28, 28), "f4"),
        "holds float32 (30, 28, 28), images are uint8 (n, 28, 28)",
    ),
    ("train_images", np.zeros((0, 28, 28), "u1"), "no images in it"),
    ("test_images", np.array(3, "u1"), "holds uint8 (), images are uint8 (n, 28, 28)"),
    ("train_labels", np.zeros((30, 8), "i4"), "holds int32 (30, 8), labels are integers (n,)"),
    ("train_labels", np.zeros(30, "f8"), "holds float64 (30), labels are integers (n,)"),
    ("train_labels", np.zeros((), "u1"), "holds uint8 (), labels are integers (n,)"),
    ("test_labels", np.zeros(0, "u1"), "no labels in it"),
    ("test_labels", np.zeros(19, "u1"), "19 labels, but t10k-images-idx3-ubyte has 20 images"),
    (
        "test_labels",
        np.arange(20, dtype="u1"),
        "label 10 in row 10, but fashion-mnist has labels from 0 to 9",
    ),
    (
        "test_labels",
        -np.arange(20, dtype="i4"),
        "label -1 in row 1, but fashion-mnist has labels from 0 to 9",
    ),
]


@pytest.mark.parametrize(("role", "array", "expected"), BAD)
def test_invalid_content_names_its_file(
    tmp_path: Path, role: Role, array: NDArray[Any], expected: str
) -> None:
    arrays = small()
    arrays[role] = array
    paths = put(tmp_path / "FashionMNIST/raw", ENTRIES["fashion-mnist"], arrays)
    assert refusal("fashion-mnist", tmp_path) == f"{paths[role]}: {expected}"
    verdicts = {finding.path: finding.verdict for finding in datasets.check("fashion-mnist", tmp_path)}
    assert verdicts[paths[role]] == expected


def test_emnist_letters_start_at_one(tmp_path: Path) -> None:
    paths = put(tmp_path, ENTRIES["emnist-letters"], small(26))
    expected = f"{paths['train_labels']}: label 0 in row 0, but emnist-letters has labels from 1 to 26"
    assert refusal("emnist-letters", tmp_path) == expected


def test_a_damaged_file_is_named(tmp_path: Path, mnist: Arrays) -> None:
    paths = put(tmp_path / "MNIST/raw", ENTRIES["mnist"], mnist, ".gz")
    whole = paths["train_images"].read_bytes()
    paths["train_images"].write_bytes(whole[: len(whole) // 2])
    assert refusal("auto", tmp_path).startswith(
        f"{paths['train_images']}: truncated: the gzip data ends after"
    )
    finding = datasets.check("mnist", tmp_path)[0]
    assert (finding.ok, finding.rows, finding.sha256) == (False, None, None)
    assert finding.verdict.startswith("truncated")


def test_missing_files_are_named(tmp_path: Path, mnist: Arrays) -> None:
    assert refusal("mnist", tmp_path / "none") == f"mnist is not in {tmp_path / 'none'}/ (no such folder)"
    assert refusal("mnist", tmp_path / "no\nne").endswith(r"no\nne/' (no such folder)")
    (tmp_path / "file").touch()
    for name in ("mnist", "auto"):
        assert refusal(name, tmp_path / "file") == f"{tmp_path / 'file'}: not a folder"
    empty = f"mnist is not in {tmp_path}/ (no train-images-idx3-ubyte or .gz in it or in MNIST/raw)"
    assert refusal("mnist", tmp_path) == empty
    with pytest.raises(DataError) as caught:
        datasets.check("mnist", tmp_path)
    assert str(caught.value) == empty
    paths = put(tmp_path / "MNIST/raw", ENTRIES["mnist"], mnist)
    paths["test_labels"].unlink()
    partial = f"mnist is not in {tmp_path}/ ({tmp_path / 'MNIST/raw'} lacks t10k-labels-idx1-ubyte)"
    assert refusal("mnist", tmp_path) == partial
    # One existing file shows that MNIST was meant, so no digits are drawn.
    said = f"{partial}; --dataset auto generates digits only if none of MNIST's files exist"
    assert refusal("auto", tmp_path) == said
    assert [finding.verdict for finding in datasets.check("mnist", tmp_path)] == [
        "ok",
        "ok",
        "ok",
        "missing",
    ]


def test_unknown_names(tmp_path: Path) -> None:
    names = "there are mnist, fashion-mnist, .*, idx, generated, auto$"
    with pytest.raises(UsageError, match=rf"^there is no data set 'cifar'; {names}"):
        datasets.load("cifar", tmp_path)
    with pytest.raises(UsageError, match=rf"^there is no data set 'fashion'; .*{names}"):
        datasets.check("fashion", tmp_path)
    with pytest.raises(UsageError, match=r"^there is no data set 'minst'; did you mean mnist\? there are "):
        datasets.fetch("minst", tmp_path)
    for call in (datasets.check, datasets.fetch):
        with pytest.raises(UsageError, match="have no files"):
            call("generated", tmp_path)


def test_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        datasets.fetch("idx", tmp_path)
    assert str(caught.value).endswith("; idx stands for your own files, which cannot be downloaded")
    put(tmp_path, ENTRIES["idx"], small())
    assert [path.name for path in datasets.fetch("idx", tmp_path)] == list(MNIST_NAMES)


def test_generated_digits(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    loaded = datasets.load(
        "generated", tmp_path, train_size=1100, test_size=40, progress=lambda *args: seen.append(args)
    )
    assert (loaded.name, loaded.source) == ("generated", "drawn by the program")
    assert loaded.train_images.shape == (1100, 28, 28)
    assert loaded.test_labels.shape == (40,)
    assert [done for _, done, _ in seen] == [1024, 1100, 1140]
    assert {total for _, _, total in seen} == {1140}
    images, labels = generated.draw(1100, "train", 0)  # at once, not in blocks
    np.testing.assert_array_equal(loaded.train_images, images)
    np.testing.assert_array_equal(loaded.train_labels, labels)
    smaller = datasets.load("generated", tmp_path, train_size=60, test_size=40)
    np.testing.assert_array_equal(smaller.train_images, loaded.train_images[:60])
    np.testing.assert_array_equal(smaller.test_images, loaded.test_images)
    assert not np.array_equal(loaded.train_images[:40], loaded.test_images)
    other = datasets.load("generated", tmp_path, seed=1, train_size=60, test_size=40)
    assert not np.array_equal(other.train_images, smaller.train_images)
    with pytest.raises(DataError, match="sizes must be at least 1, not 60 and 0"):
        datasets.load("generated", tmp_path, train_size=60, test_size=0)


def test_auto_without_mnist_draws_and_says_why(tmp_path: Path) -> None:
    loaded = datasets.load("auto", tmp_path / "none", download=False, train_size=20, test_size=10)
    assert loaded.name == "generated"
    assert loaded.source == (
        f"drawn by the program: MNIST is not in {tmp_path / 'none'} and cannot be downloaded"
    )


def test_written_files_are_read_back_and_never_replace_others(tmp_path: Path) -> None:
    drawn = datasets.load("generated", tmp_path, train_size=30, test_size=20)
    seen: list[tuple[str, int, int | None]] = []
    paths = datasets.write(drawn, tmp_path / "new" / "folder", lambda *args: seen.append(args))
    assert [done for _, done, _ in seen] == [0, 30 * 784, 30 * 785, 30 * 785 + 20 * 784, 50 * 785]
    assert {total for _, _, total in seen} == {50 * 785}
    assert [path.name for path in paths] == [f"{name}.gz" for name in MNIST_NAMES]
    loaded = datasets.load("idx", tmp_path / "new" / "folder", download=False)
    for role, array in loaded.arrays().items():
        np.testing.assert_array_equal(array, drawn.arrays()[role])
    assert (loaded.mean, loaded.std) == (drawn.mean, drawn.std)

    paths[3].unlink()
    assert datasets.write(drawn, tmp_path / "new" / "folder") == paths  # finishes what was begun
    other = datasets.load("generated", tmp_path, seed=1, train_size=30, test_size=20)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: holds other data"):
        datasets.write(other, tmp_path / "new" / "folder")
    # Unpacked files are found first, so gzipped files next to them would never be read.
    shutil.rmtree(tmp_path / "new")
    put(tmp_path / "new", ENTRIES["idx"], small())
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: holds other data"):
        datasets.write(other, tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 4


def resized(arrays: Arrays, *shape: int) -> Arrays:
    """Replace the images by others of this shape."""
    rng = np.random.default_rng(7)
    images: Arrays = {
        "train_images": rng.integers(0, 256, (len(arrays["train_images"]), *shape), np.uint8),
        "test_images": rng.integers(0, 256, (len(arrays["test_images"]), *shape), np.uint8),
    }
    return arrays | images


@pytest.mark.parametrize(
    ("stored", "shape"), [((20, 20), (1, 20, 20)), ((64, 48, 3), (3, 64, 48)), ((8, 9), (1, 8, 9))]
)
def test_images_of_any_size_and_colour(
    tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    own: Any = resized(small(), *stored)
    given = from_arrays(**own)
    assert given.image_shape == shape
    paths = datasets.write(given, tmp_path)
    assert [path.name for path in paths[::2]] == [
        f"{part}-images-idx{len(stored) + 1}-ubyte.gz" for part in ("train", "t10k")
    ]
    assert all(found.ok for found in datasets.check("idx", tmp_path))
    loaded = datasets.load("idx", tmp_path)
    for role, array in own.items():
        np.testing.assert_array_equal(loaded.arrays()[role], array)
        np.testing.assert_array_equal(given.arrays()[role], array)
    assert (loaded.mean, loaded.std) == datasets.pixel_statistics(own["train_images"])
    tensors = {role: torch.from_numpy(array) for role, array in own.items()}
    for role in ("train_images", "test_images"):
        images = tensors[role]
        tensors[role] = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    first: Any = tensors
    np.testing.assert_array_equal(from_arrays(**first).train_images, own["train_images"])


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ((27, 0), "the images have no pixels"),
        ((32, 3), "this is one image in colour, without a dimension for several"),
        ((784,), "each image needs its height and width as dimensions"),
        ((3, 20, 24), "the colours must be the last dimension"),
        ((20, 24, 4), "leave out the fourth channel (transparency)"),
        ((20, 24, 1), "leave out the last dimension"),
        ((20, 24, 2), "there are 2 channels"),
    ],
)
def test_what_images_cannot_be(tmp_path: Path, stored: tuple[int, ...], problem: str) -> None:
    paths = put(tmp_path, ENTRIES["idx"], resized(small(), *stored))
    shape = f"({', '.join(map(str, (30, *stored)))})"
    wanted = "uint8 (n, height, width), or in colour (n, height, width, 3)"
    text = f"holds uint8 {shape}, images are {wanted}: {problem}"
    assert refusal("idx", tmp_path) == f"{paths['train_images']}: {text}"
    assert datasets.check("idx", tmp_path)[0].verdict == text


def test_test_images_have_the_shape_of_the_training_images(tmp_path: Path) -> None:
    own: Any = resized(small(), 20, 24, 3) | {"test_images": np.zeros((20, 20, 24), "u1")}
    paths = put(tmp_path, ENTRIES["idx"], own)
    text = "images of 24 wide and 20 high, but {} has images of 24 wide and 20 high in colour"
    expected = text.format("train-images-idx3-ubyte")
    assert refusal("idx", tmp_path) == f"{paths['test_images']}: {expected}"
    assert datasets.check("idx", tmp_path)[2].verdict == expected
    with pytest.raises(DataError, match=f"^test_images: {text.format('train_images')}$"):
        from_arrays(**own)


def test_pixel_statistics_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_COUNT_BLOCK", 1000)  # several blocks, the last one short
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    values = [Fraction(int(pixel), 255) for pixel in images.reshape(-1)]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert datasets.pixel_statistics(images) == (float(mean), float(variance) ** 0.5)
    assert datasets.pixel_statistics(np.full((2, 28, 28), 255, np.uint8)) == (1.0, 1.0)


def test_raw_gzip_content_without_the_suffix(tmp_path: Path) -> None:
    paths = put(tmp_path, ENTRIES["idx"], small())
    for path in paths.values():
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert len(datasets.load("idx", tmp_path).train_images) == 30


def test_importing_does_nothing_heavy() -> None:
    program = "import sys, distributed_mnist.data.datasets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "requests", "pooch", "urllib3"} & set(done.stdout.split())


def test_folders_with_the_names_of_files(tmp_path: Path) -> None:
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        (tmp_path / f"{name}-idx{3 if 'images' in name else 1}-ubyte").mkdir()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is a folder, not a file"):
        datasets.load("idx", tmp_path)


def test_a_torn_download_is_told_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    drawn = datasets.load("generated", Path(), train_size=8, test_size=8)
    datasets.write(drawn, folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"truncated.*; delete it, and it is downloaded again"):
        datasets.load("mnist", tmp_path)
