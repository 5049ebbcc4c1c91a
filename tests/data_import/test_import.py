"""`dmnist data import`: every format from files as other programs write them, and refusals in one line."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_files as foreign
import numpy as np
import pytest
import torch
from PIL import Image

from distributed_mnist.cli.main import main
from distributed_mnist.data import catalog, class_names, datasets, idx
from distributed_mnist.data.catalog import ENTRIES, MNIST_NAMES, ROLES
from distributed_mnist.data_import import command
from distributed_mnist.errors import DataError


def imported(source: Path, out: Path, *, test: Path | None = None, fraction: float | None = None) -> str:
    """Import, and return what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(command, "_print_lines", lambda _, more: lines.extend(more))
        assert command.run(source=source, data=out, test=test, test_fraction=fraction, as_json=False) == 0
    return "\n".join(lines)


def stored(out: Path) -> foreign.Arrays:
    names = dict(zip(ROLES, MNIST_NAMES, strict=True))
    return {role: idx.read(next(out.glob(f"{names[role].partition('-idx')[0]}*"))) for role in ROLES}


def same(left: foreign.Arrays, right: foreign.Arrays) -> None:
    for role in ROLES:
        np.testing.assert_array_equal(left[role], right[role], role)


@pytest.mark.parametrize("name", foreign.WRITERS)
def test_a_format_gives_what_was_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = foreign.digits()
    files = tuple(replace(ENTRIES["mnist"].file(role), sha256=idx.digest(arrays[role])) for role in ROLES)
    monkeypatch.setitem(catalog.ENTRIES, "mnist", replace(ENTRIES["mnist"], files=files))
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    foreign.WRITERS[name](source, arrays)
    said = imported(source, out)
    same(stored(out), arrays)
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    assert f"this is mnist: its checksums are right; use it with --dataset mnist --data {out}" in said
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.gz" for name in MNIST_NAMES)
    same(datasets.load("mnist", out, download=False).arrays(), arrays)


@pytest.mark.parametrize("write", [foreign.emnist_source_files, foreign.emnist_csv])
def test_emnist_is_turned_upright(tmp_path: Path, write: Callable[[Path, foreign.Arrays], None]) -> None:
    (tmp_path / "source").mkdir()
    arrays = foreign.digits()
    write(tmp_path / "source", arrays)
    assert "upright" in imported(tmp_path / "source", tmp_path / "out")
    loaded = datasets.load("idx", tmp_path / "out")
    same(loaded.arrays(), arrays)
    assert loaded.class_names == ENTRIES["emnist-letters"].class_names


def test_one_of_many_sets_in_a_folder(tmp_path: Path) -> None:
    arrays = foreign.digits()
    for split in ("letters", "mnist"):
        foreign.emnist_source_files(tmp_path, arrays, split)
        foreign.emnist_csv(tmp_path, arrays, split)
    with pytest.raises(
        DataError, match=r"holds 4 data sets: .*\(IDX\).*\(CSV\); import one of these paths"
    ):
        imported(tmp_path, tmp_path / "out")
    imported(tmp_path / "emnist-letters-test-images-idx3-ubyte", tmp_path / "one")
    same(stored(tmp_path / "one"), arrays)
    train, test = (tmp_path / f"emnist-mnist-{part}.csv" for part in ("train", "test"))
    imported(train, tmp_path / "two", test=test)
    same(stored(tmp_path / "two"), arrays)
    assert datasets.load("idx", tmp_path / "two").class_names == catalog.DIGITS


CIFAR: dict[str, Callable[[Path, foreign.Arrays], None]] = {
    "binary": foreign.cifar_binary,
    "python2": foreign.cifar_python,
    "python3": lambda folder, arrays: foreign.cifar_python(folder, arrays, foreign.python3_pickle),
}


@pytest.mark.parametrize("version", CIFAR)
def test_cifar(tmp_path: Path, version: str) -> None:
    arrays = foreign.digits(size=(32, 32, 3))
    (tmp_path / "source").mkdir()
    CIFAR[version](tmp_path / "source", arrays)
    said = imported(tmp_path / "source", tmp_path / "out")
    assert "30 images of 32 x 32 in colour" in said and "10 classes: airplane, automobile" in said
    same(stored(tmp_path / "out"), arrays)
    assert class_names.read(tmp_path / "out") == tuple(foreign.CIFAR_NAMES)


def test_cifar_100(tmp_path: Path) -> None:
    arrays = foreign.digits(size=(32, 32, 3))
    for name in ("train", "test"):
        images, labels = foreign.part(arrays, name)
        columns = [labels[:, None] // 2, labels[:, None], foreign.planes(images)]
        (tmp_path / f"{name}.bin").write_bytes(np.concatenate(columns, 1).tobytes())
    imported(tmp_path, tmp_path / "out")
    same(stored(tmp_path / "out"), arrays)


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    """Parts may list their classes differently: the test folder lacks one."""
    red, green = np.zeros((2, 28, 28, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    grey = np.full((28, 28), 7, np.uint8)
    for name, image in {
        "train/cat/a2.png": red,
        "train/cat/a10.png": grey,
        "train/dog/a3.png": green,
        "train/emu/a1.png": grey,
        "val/cat/a1.png": red,
        "test/dog/a1.png": green,
        "test/emu/a1.png": red,
    }.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    said = imported(tmp_path / "source", tmp_path / "out")
    assert f"left out: {tmp_path}/source/val" in said and "3 classes: cat, dog, emu" in said
    arrays = stored(tmp_path / "out")
    assert arrays["train_labels"].tolist() == [2, 0, 1, 0]  # in the order of 1, 2, 3 and 10
    assert arrays["test_labels"].tolist() == [1, 2]
    np.testing.assert_array_equal(arrays["train_images"][1:3], [red, green])
    np.testing.assert_array_equal(arrays["train_images"][3], np.stack([grey] * 3, -1))


def test_classes_only_and_a_test_part_split_off(tmp_path: Path) -> None:
    arrays = foreign.digits()
    foreign.mnist_png(tmp_path, arrays)
    source = tmp_path / "mnist_png/training"
    with pytest.raises(
        DataError, match="has no test part: name one with --test PATH, or add --test-fraction"
    ):
        imported(source, tmp_path / "out")
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        imported(source, out, fraction=0.2)
    same(stored(first), stored(second))
    found = stored(first)
    assert (len(found["train_images"]), len(found["test_images"])) == (24, 6)
    whole = np.concatenate([found["train_images"], found["test_images"]]).reshape(30, -1)
    assert (
        np.unique(whole, axis=0).tolist()
        == np.unique(arrays["train_images"].reshape(30, -1), axis=0).tolist()
    )


def test_kaggles_digit_recognizer(tmp_path: Path) -> None:
    """Its test.csv has no labels."""
    foreign.bare_csv(tmp_path, foreign.digits(), "{}.csv")
    pixels = ",".join(f"pixel{i}" for i in range(784))
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text(f"label,{pixels}\n{train.read_text()}")
    rows = [line.partition(",")[2] for line in test.read_text().splitlines()]
    test.write_text("\n".join([pixels, *rows]))
    (tmp_path / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
    with pytest.raises(
        DataError, match=r"test.csv has no labels: name one with --test PATH, or add --test-f"
    ):
        imported(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"test.csv: has no labels, so nothing can be learnt from it"):
        imported(test, tmp_path / "out", fraction=0.1)
    imported(tmp_path, tmp_path / "out", fraction=0.1)
    assert len(stored(tmp_path / "out")["test_images"]) == 3


def test_labels_that_do_not_count_from_0(tmp_path: Path) -> None:
    arrays = foreign.digits()
    for role in ("train_labels", "test_labels"):
        arrays[role] = arrays[role].astype(np.int64) * 100 + 1
    foreign.keras(tmp_path, arrays)
    said = imported(tmp_path, tmp_path / "out")
    assert "the labels are 1, 101, 201, ..., 901, and were numbered from 0" in said
    loaded = datasets.load("idx", tmp_path / "out")
    assert loaded.class_names[:2] == ("1", "101")
    np.testing.assert_array_equal(loaded.train_labels, foreign.digits()["train_labels"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign.keras(tmp_path, foreign.digits())
    with pytest.raises(SystemExit) as end:
        main(["data", "import", f"{tmp_path}/mnist.npz", "--data", f"{tmp_path}/out", "--json"])
    assert end.value.code == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["format"], told["dataset"], told["left_out"]) == ("npz", "idx", [])
    assert [file["shape"] for file in told["files"]] == [[30, 28, 28], [30], [20, 28, 28], [20]]
    for file in told["files"]:
        assert idx.digest(idx.read(Path(file["path"]))) == file["sha256"]
    with pytest.raises(SystemExit) as end:  # the same again, for people
        main(["data", "import", f"{tmp_path}/mnist.npz", "--data", f"{tmp_path}/out"])
    lines = capsys.readouterr().out.splitlines()
    assert (end.value.code, lines[1]) == (0, f"{told['files'][0]['path']}  30 images of 28 x 28")
    assert lines[2] == f"  sha256 {told['files'][0]['sha256']}"  # fits into a terminal of 80 columns
    for wrong in (["--test-fraction", "1"], ["--test-fraction", "0.1", "--test", "x"]):
        with pytest.raises(SystemExit) as end:
            main(["data", "import", f"{tmp_path}/mnist.npz", "--data", f"{tmp_path}/out", *wrong])
        assert end.value.code == 2
        assert re.fullmatch(r"dmnist: .*--test-fraction.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["keras", "kaggle_csv", "hub", "old_torchvision", "mnist_png"])
def test_a_folder_without_idx_files_says_what_to_run(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    foreign.WRITERS[name](folder, foreign.digits())
    hint = rf"it holds .*: (dmnist data import '{folder}' --data '{folder}')\)"
    for dataset in ("idx", "mnist"):
        with pytest.raises(DataError, match=hint):
            datasets.load(dataset, folder, download=False)
    # These files show that digits were not meant to be drawn.
    with pytest.raises(DataError, match=hint):
        datasets.load("auto", folder, download=False)
    with pytest.raises(SystemExit) as end:
        main(["data", "import", str(folder), "--data", str(folder)])
    assert end.value.code == 0
    assert len(datasets.load("idx", folder).train_images) == 30


def test_nothing_is_replaced_or_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    foreign.cifar_binary(tmp_path, foreign.digits(size=(32, 32, 3)))
    written: list[Path] = []

    def full_disk(path: Path, array: Any) -> None:
        if len(written) == 2:
            raise DataError(f"{path}: cannot be written: no space left on device")
        written.append(path)
        path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(idx, "write", full_disk)
        with pytest.raises(DataError, match="no space left"):
            imported(tmp_path, out)
    assert len(written) == 2 and list(out.iterdir()) == []
    imported(tmp_path, out)
    imported(tmp_path, out)  # the same again
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(DataError, match=r"class-names.txt: holds other names"):
        imported(tmp_path, out)
    foreign.keras(tmp_path, foreign.digits())
    with pytest.raises(DataError, match="holds other data"):
        imported(tmp_path / "mnist.npz", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def csv_with(old: str, new: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        arrays = foreign.digits()
        arrays["train_images"][:] = 5
        foreign.bare_csv(folder, arrays, "{}.csv")
        path = folder / "train.csv"
        lines = path.read_text().splitlines()
        lines[2] = lines[2].replace(old, new, 1)
        path.write_text("\n".join(lines))

    return write


def npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / "a.npz", allow_pickle=True, **arrays)


def lying_npz(folder: Path) -> None:
    """Its header declares a terabyte."""
    foreign.keras(folder, foreign.digits())
    path = folder / "mnist.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["x_train.npy"] = members["x_train.npy"].replace(
        b"(30, 28, 28), }     ", b"(999999999, 28, 28), }"
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def pictures(**contents: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        foreign.mnist_png(folder, foreign.digits())
        for name, content in contents.items():
            (folder / f"mnist_png/training/3/{name}.png").write_bytes(content)

    return write


def changed(
    write: Callable[..., None], pattern: str, change: Callable[[bytes], bytes]
) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        write(folder, foreign.digits(size=(32, 32, 3) if "cifar" in write.__name__ else (28, 28)))
        path = next(iter(sorted(folder.rglob(pattern))))
        path.write_bytes(change(path.read_bytes()))

    return damage


def torch_file(value: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(value, folder / "training.pt")


def cifar_pickle(value: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "data_batch_1").write_bytes(pickle.dumps({"labels": value}, 2))


def nested_cifar(end: bytes) -> Callable[[Path], object]:
    """A dictionary with a tuple of a tuple, 300,000 times, as a key. Its hash ended the process."""
    labels = b"X\x06\x00\x00\x00labelsK\x01s"
    start = b"\x80\x02}" + labels + (b"(" if end in b"ud" else b"")
    return lambda folder: (folder / "a").write_bytes(
        start + b"K\x01" + b"\x85" * 300_000 + b"K\x01" + end + b"."
    )


def repeated_cifar(folder: Path) -> None:
    """The same text encoded a thousand times."""
    start = b"\x80\x02}X\x06\x00\x00\x00labels](c_codecs\nencode\nq\x01X\xe8\x03\x00\x00" + b"a" * 1000
    again = b"h\x01h\x02h\x03\x86R" * 1000
    (folder / "a").write_bytes(start + b"q\x02X\x06\x00\x00\x00latin1q\x03\x86R" + again + b"es.")


def npz_header(header: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        text = header.encode() + b"\n"
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        with zipfile.ZipFile(folder / "a.npz", "w") as archive:
            archive.writestr("x_train.npy", start + text + b"a")

    return write


def zipped(folder: Path) -> None:
    foreign.kaggle_csv(folder, foreign.digits())
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for path in sorted(folder.glob("*.csv")):
            archive.write(path, path.name)
            path.unlink()


X, Y = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)
OTHER = {"x_test": X, "y_test": Y}
PNG = foreign.png(np.zeros((28, 28), np.uint8))
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, r"no data set of a known format is in it \(NumPy arrays .*IDX\)"),
    "zip": (zipped, r"archive.zip: an archive: unpack it and import the folder"),
    "word in a csv": (
        csv_with(",5,", ",five,"),
        r"train.csv: row 3, column 2 is 'five', not a whole number",
    ),
    "large number in a csv": (csv_with(",5,", ",256,"), r"train.csv: row 3, column 2 is '256', not"),
    "very large number in a csv": (csv_with(",5,", f",{'9' * 5000},"), r"row 3, column 2 is '9+, not"),
    "short row in a csv": (csv_with(",5,", ","), r"train.csv: row 3 has 784 values, row 1 has 785"),
    "csv.gz cut": (
        changed(foreign.bare_csv, "train.csv.gz", lambda data: data[:-900]),
        r"train.csv.gz: damaged",
    ),
    "objects in an npz": (npz(x_train=np.array([{}]), y_train=Y), r"x_train: holds Python objects"),
    "names in an npz": (npz(a=X, b=Y), r"a.npz: has a, (allow_pickle, )?b, but no x_train and y_train"),
    "labels in an npz": (npz(x_train=X, y_train=Y[:2], **OTHER), r"x_train: 3 images, but 2 labels"),
    "floats in an npz": (
        npz(x_train=X / 1.0, y_train=Y, **OTHER),
        r"images must be integers from 0 to 255",
    ),
    "size in an npz": (
        npz(x_train=X[:, 1:], y_train=Y, **OTHER),
        r"images have 28 x 27 pixels, the test im",
    ),
    "huge npz": (lying_npz, r"x_train: 2352. bytes, its header declares 783999999216"),
    "size of nothing in an npz": (
        npz_header("{'descr': '|V0', 'fortran_order': False, 'shape': (1,)}"),
        r"x_train: (not a NumPy array|1 bytes)",
    ),
    "negative size in an npz": (
        npz_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1)}"),
        r"x_train: not a NumPy array \(can only",
    ),
    "unfinished header of an npz": (npz_header("(" * 5000), r"x_train: not a NumPy array"),
    "npz cut": (changed(foreign.keras, "*.npz", lambda data: data[:5000]), r"mnist.npz: damaged"),
    "bad checksum": (
        changed(foreign.keras, "*.npz", lambda d: d[:9000] + b"abc" + d[9003:]),
        r"npz: damaged",
    ),
    "code in a pt": (torch_file(Harmful()), r"training.pt: it holds more than tensors"),
    "no pair": (torch_file({"a": torch.zeros(2)}), r"training.pt: is no pair of tensors"),
    "old pt cut": (
        changed(foreign.old_torchvision, "training.pt", lambda data: data[:-9000]),
        r"training.pt: damaged",
    ),
    "pt cut": (
        changed(foreign.torchvision, "training.pt", lambda data: data[:9000]),
        r"training.pt: damaged",
    ),
    "parquet cut": (
        changed(foreign.hub, "train-*", lambda data: data[:-9]),
        r"parquet: damaged, or not read",
    ),
    "parquet garbled": (
        changed(foreign.hub, "train-*", lambda d: d[:99] + bytes(900) + d[999:]),
        r"parquet: ",
    ),
    "picture cut": (pictures(x=PNG[:50]), r"3/x.png: "),
    "no picture": (pictures(x=b"hello"), r"3/x.png: not a picture of a known format"),
    "size of a picture": (
        pictures(x=foreign.png(np.zeros((20, 28), np.uint8))),
        r"3/x.png: 28 x 20 pixels, but .*0.png has 28 x 28: scale all to one size",
    ),
    "code in a cifar": (
        cifar_pickle(Harmful()),
        r"data_batch_1: no file of CIFAR's: it names \w+.mkdir, which",
    ),
    "no array": (cifar_pickle([1]), r"data_batch_1: has no array `data`"),
    "huge integer": (cifar_pickle(1 << 70), r"no file of CIFAR's: it uses LONG1"),
    "memo": (
        lambda folder: (folder / "a").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f(U\x06labelsK\x01u."),
        r"a: no file of CIFAR's: damaged",
    ),
    **{
        f"nested key {end!r}": (nested_cifar(end), "no file of CIFAR's: it has a tuple as a key")
        for end in (b"s", b"u", b"d")
    },
    "repeated text": (repeated_cifar, "no file of CIFAR's: it makes more bytes than it has"),
    "cifar cut": (
        changed(foreign.cifar_python, "data_batch_1", lambda data: data[:-500]),
        r"no file of CIFAR's",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    monkeypatch.chdir(tmp_path)
    write, told = WRONG[name]
    write(source)
    with pytest.raises(DataError, match=told) as caught:
        imported(source, out)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert not out.exists() and not Path("harm").exists()


def test_a_test_class_that_the_training_part_lacks(tmp_path: Path) -> None:
    foreign.mnist_png(tmp_path, foreign.digits())
    shutil.rmtree(tmp_path / "mnist_png/training/9")
    with pytest.raises(DataError, match="the test part has the classes 9, which the training part lacks"):
        imported(tmp_path, tmp_path / "out")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.hub(tmp_path, foreign.digits())
    monkeypatch.setattr("distributed_mnist.data_import.parquet.find_spec", lambda name: None)
    with pytest.raises(
        Exception, match=r"need the package pyarrow: .* install 'distributed-mnist\[parquet\]'"
    ):
        imported(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("text", ["a\nb", "a\na\nb", "a\n\nb\nc", "", "\x1b[1m\nb\nc", "\xff"])
def test_unusable_class_names(tmp_path: Path, text: str) -> None:
    arrays = foreign.digits()
    for role in ("train_labels", "test_labels"):
        arrays[role] %= 3
    datasets.write_arrays(arrays, tmp_path)
    (tmp_path / class_names.FILE).write_bytes(text.encode("latin1"))
    with pytest.raises(
        DataError, match=r"class-names.txt: (has 2 names, but there is a label 2|has|must|not)"
    ) as e:
        datasets.load("idx", tmp_path)
    assert str(e.value).isprintable()
