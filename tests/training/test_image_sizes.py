"""Test a run on small colour images that are not square, from training to every use of its network."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import train
from warm import here

import distributed_mnist as library
from distributed_mnist.data import datasets, idx
from distributed_mnist.data.arrays import from_arrays
from distributed_mnist.errors import CheckpointError, DataError

HEIGHT, WIDTH, CLASSES = 12, 10, 3


def coloured(count: int) -> tuple[Any, Any]:
    """Return images of one colour each, with noise, and their classes: which colour is the lightest."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, CLASSES, count).astype(np.uint8)
    images = rng.integers(0, 120, (count, HEIGHT, WIDTH, 3), np.uint8)
    images[np.arange(count), :, :, labels] += 80
    return images, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the run of one process on it."""
    folder = tmp_path_factory.mktemp("sizes")
    datasets.write(from_arrays(*coloured(96), *coloured(24)), folder / "data")
    return folder


def flags(folder: Path) -> list[object]:
    moved = ("--shift", 1, "--rotate", 5, "--scale", 0.1)
    model = ("--model", "cnn-small", "--precision", "bf16", "--batch-size", 32, "--epochs", 8)
    return ["--dataset", "idx", "--data", folder / "data", *model, *moved]


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Path]:
    train(*flags(folder), nproc=1, out=folder / "run")
    yield folder / "run"


def test_the_weights_are_the_same_at_any_number_of_processes(folder: Path, run: Path) -> None:
    alone = json.loads((run / "result.json").read_text())
    assert train(*flags(folder), nproc=3, out=folder / "three")["weights_sha256"] == alone["weights_sha256"]
    assert alone["test_accuracy"] > 0.8  # a third by chance


def test_its_network_takes_pictures_arrays_and_files(folder: Path, run: Path) -> None:
    images, labels = coloured(24)
    trained = library.load(run)
    assert trained.image_shape == (3, HEIGHT, WIDTH)
    expected = trained.predict(images)
    assert (expected.numpy() == labels).mean() > 0.8
    assert torch.equal(trained.predict(images.transpose(0, 3, 1, 2) / 255), expected)
    assert torch.equal(trained.predict([Image.fromarray(image) for image in images]), expected)
    assert torch.equal(trained.predict(images[3]), expected[3:4])
    with pytest.raises(DataError, match=r"of shape \(n, 12, 10, 3\), .*; not of shape \(24, 10, 12, 3\)$"):
        trained.predict(images.transpose(0, 2, 1, 3))

    pictures = folder / "pictures"
    pictures.mkdir()
    for i, image in enumerate(images[:3]):
        Image.fromarray(image).save(pictures / f"{i}.png")
    Image.fromarray(images[3]).resize((WIDTH * 4, HEIGHT * 2), 0).save(pictures / "3.png")
    ended = here("predict", run, pictures, "--json", "--device", "cpu")
    answers = json.loads(ended.stdout)["images"]
    assert [answer["label"] for answer in answers] == expected[:4].tolist()
    assert [answer.get("resized_from") for answer in answers] == [None, None, None, [24, 40]]
    idx.write(folder / "grey", images[..., 0])
    ended = here("predict", run, folder / "grey", "--device", "cpu")
    assert "not uint8 images of 10 wide and 12 high in colour" in ended.stderr
    assert "one takes images of 10" in here("predict", run, pictures, "--ink", "dark").stderr


def test_other_data_is_refused(run: Path) -> None:
    digits = datasets.load("generated", Path(), train_size=8, test_size=8)
    with pytest.raises(
        CheckpointError, match="takes images of 10 wide and 12 high in colour, but those of"
    ):
        library.evaluate(run, digits)


def test_its_report_shows_the_mistakes_in_colour(run: Path, folder: Path) -> None:
    images = coloured(24)[0]
    written = json.loads((run / "mistakes.json").read_text())
    assert written["image_shape"] == [3, HEIGHT, WIDTH]
    for mistake in written["mistakes"]:
        assert base64.b64decode(mistake["image"]) == images[mistake["index"]].tobytes()
    if not written["mistakes"]:
        mistake = {"index": 2, "label": 0, "predicted": 1, "confidence": 0.5}
        mistake["image"] = base64.b64encode(images[2].tobytes()).decode()
        written["mistakes"] = [mistake]
        (run / "mistakes.json").write_text(json.dumps(written))
    out = folder / "page.html"
    assert here("report", run, "--out", out).code == 0
    found = re.search(r'src="data:image/png;base64,([^"]+)"', out.read_text())
    assert found is not None
    (folder / "found.png").write_bytes(base64.b64decode(found[1]))
    shown = np.asarray(Image.open(folder / "found.png"))
    np.testing.assert_array_equal(shown, images[written["mistakes"][0]["index"]])


def test_an_exported_file_takes_its_images(run: Path, folder: Path) -> None:
    ended = here("export", run, "--format", "safetensors", "--out", folder / "m.safetensors", "--json")
    assert ended.code == 0, ended
    about = json.loads(ended.stdout)
    assert about["input"].startswith("images: uint8 (n, 12, 10, 3), ")
    assert about["files"][0]["compared_images"] == 74
