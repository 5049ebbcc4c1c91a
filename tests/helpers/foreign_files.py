"""Write data sets as others do: Keras, Kaggle, the Hugging Face hub, torchvision, CIFAR's authors."""

import csv
import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distributed_mnist.data import idx
from distributed_mnist.data.catalog import ENTRIES, ROLES, Role

Arrays = dict[Role, NDArray[Any]]


def digits(train: int = 30, test: int = 20, size: tuple[int, ...] = (28, 28)) -> Arrays:
    """A tiny set with ten classes and images that are not symmetric."""
    rng = np.random.default_rng(train)
    return {
        "train_images": rng.integers(0, 256, (train, *size), np.uint8),
        "train_labels": (np.arange(train) * 7 % 10).astype(np.uint8),
        "test_images": rng.integers(0, 256, (test, *size), np.uint8),
        "test_labels": (np.arange(test) * 3 % 10).astype(np.uint8),
    }


def part(arrays: Arrays, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    return (
        (arrays["train_images"], arrays["train_labels"])
        if name == "train"
        else (arrays["test_images"], arrays["test_labels"])
    )


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def keras(folder: Path, arrays: Arrays) -> None:
    (x_train, y_train), (x_test, y_test) = part(arrays, "train"), part(arrays, "test")
    np.savez_compressed(
        folder / "mnist.npz", x_test=x_test, x_train=x_train, y_train=y_train, y_test=y_test
    )


def medmnist(folder: Path, arrays: Arrays) -> None:
    values: dict[str, Any] = {
        r: array[:, None] if array.ndim == 1 else array for r, array in arrays.items()
    }
    empty = np.zeros((1, 28, 28), np.uint8)
    np.savez(folder / "medmnist.npz", val_images=empty, val_labels=np.zeros((1, 1)), **values)


def kaggle_csv(folder: Path, arrays: Arrays) -> None:
    names = ["label", *(f"{row}x{column}" for row in range(1, 29) for column in range(1, 29))]
    for name in ("train", "test"):
        images, labels = part(arrays, name)
        with (folder / f"mnist_{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(np.concatenate([labels[:, None], images.reshape(len(images), -1)], 1).tolist())


def bare_csv(folder: Path, arrays: Arrays, names: str = "{}.csv.gz") -> None:
    for name in ("train", "test"):
        images, labels = part(arrays, name)
        rows = np.concatenate([labels[:, None], images.reshape(len(images), -1)], 1)
        text = "".join(f"{','.join(map(str, row))}\n" for row in rows.tolist()).encode()
        path = folder / names.format(name)
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def openml_csv(folder: Path, arrays: Arrays) -> None:
    """The labels are in the last column, and Windows ends the lines."""
    for name in ("train", "test"):
        images, labels = part(arrays, name)
        rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], 1)
        head = [*(f"pixel{i}" for i in range(1, 785)), "class"]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows.tolist()])


def hub(folder: Path, arrays: Arrays, class_names: list[str] | None = None) -> None:
    """As `ylecun/mnist`: pictures, with the features in the metadata; the training part in two files."""
    import pyarrow
    from pyarrow import parquet

    names = class_names or list(map(str, range(10)))
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (folder / "mnist").mkdir(parents=True)
    for name, shards in (("train", 2), ("test", 1)):
        images, labels = part(arrays, name)
        for shard, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
            pictures = [{"bytes": png(images[row]), "path": None} for row in rows]
            columns = {"image": pyarrow.array(pictures, kind), "label": labels[rows].astype(np.int64)}
            table = pyarrow.table(columns).replace_schema_metadata(metadata)
            parquet.write_table(table, folder / "mnist" / f"{name}-{shard:05}-of-{shards:05}.parquet")


def lists_in_parquet(folder: Path, arrays: Arrays) -> None:
    import pyarrow
    from pyarrow import parquet

    for name in ("train", "test"):
        images, labels = part(arrays, name)
        parquet.write_table(
            pyarrow.table({"label": labels, "pixels": images.tolist()}), folder / f"{name}.parquet"
        )


def torchvision(folder: Path, arrays: Arrays, *, zipped: bool = True) -> None:
    (folder / "MNIST/processed").mkdir(parents=True)
    for name, file in (("train", "training.pt"), ("test", "test.pt")):
        images, labels = part(arrays, name)
        pair = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        path = folder / "MNIST/processed" / file
        torch.save(pair, path, _use_new_zipfile_serialization=zipped)


def old_torchvision(folder: Path, arrays: Arrays) -> None:
    torchvision(folder, arrays, zipped=False)


def mnist_png(folder: Path, arrays: Arrays) -> None:
    for name, inner in (("train", "mnist_png/training"), ("test", "mnist_png/testing")):
        images, labels = part(arrays, name)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / inner / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    (folder / "mnist_png/training/3/Thumbs.db").write_bytes(b"\xd0\xcf")


WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    writer.__name__: writer
    for writer in (
        keras,
        medmnist,
        kaggle_csv,
        bare_csv,
        openml_csv,
        hub,
        lists_in_parquet,
        torchvision,
        old_torchvision,
        mnist_png,
    )
}


def emnist_source_files(folder: Path, arrays: Arrays, split: str = "letters") -> None:
    """As Kaggle has them. The images are stored transposed."""
    entry = ENTRIES[f"emnist-{split}"]
    for role in ROLES:
        stored = (
            arrays[role].transpose(0, 2, 1) if arrays[role].ndim == 3 else arrays[role] + entry.first_label
        )
        idx.write(folder / entry.file(role).name, stored)


def emnist_csv(folder: Path, arrays: Arrays, split: str = "letters") -> None:
    first = ENTRIES[f"emnist-{split}"].first_label
    stored: Arrays = {r: a.transpose(0, 2, 1) if a.ndim == 3 else a + first for r, a in arrays.items()}
    bare_csv(folder, stored, f"emnist-{split}-{{}}.csv")


def planes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colour images as CIFAR stores them: `(n, 3072)`, red before green before blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_binary(folder: Path, arrays: Arrays) -> None:
    halves = np.array_split(np.arange(len(arrays["train_images"])), 2)
    images, labels = part(arrays, "train")
    batches = {f"data_batch_{i + 1}.bin": (images[rows], labels[rows]) for i, rows in enumerate(halves)}
    for name, (images, labels) in (batches | {"test_batch.bin": part(arrays, "test")}).items():
        (folder / name).write_bytes(np.concatenate([labels[:, None], planes(images)], 1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR_NAMES) + "\n\n")


def cifar_python(
    folder: Path, arrays: Arrays, dump: Callable[[dict[str, Any]], bytes] | None = None
) -> None:
    dump = dump or python2_pickle
    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    halves = np.array_split(np.arange(len(arrays["train_images"])), 2)
    images, labels = part(arrays, "train")
    batches = {f"data_batch_{i + 1}": (images[rows], labels[rows]) for i, rows in enumerate(halves)}
    for name, (images, labels) in (batches | {"test_batch": part(arrays, "test")}).items():
        content = {
            "batch_label": f"batch {name}",
            "labels": labels.tolist(),
            "data": planes(images),
            "filenames": [f"{i}.png" for i in range(len(labels))],
        }
        (inner / name).write_bytes(dump(content))
    meta = {"num_cases_per_batch": 10000, "label_names": CIFAR_NAMES, "num_vis": 3072}
    (inner / "batches.meta").write_bytes(dump(meta))


def python3_pickle(value: dict[str, Any]) -> bytes:
    return pickle.dumps({key.encode(): content for key, content in value.items()}, protocol=2)


def python2_pickle(value: dict[str, Any]) -> bytes:
    """What Python 2's cPickle and NumPy 1 write with protocol 2, as in the published files."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        shape = b"".join(map(_python2, value.shape)) + b"\x86"
        data = value.tobytes()
        return made + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    text = value.encode("latin1")
    return b"U" + bytes([len(text)]) + text
