"""Conversion of pictures to MNIST's format, and the predictions of `dmnist predict`."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from ranks import train
from warm import here

from distributed_mnist.data import datasets, idx
from distributed_mnist.errors import DataError
from distributed_mnist.inference import image_files, predict
from distributed_mnist.inference.predict import as_text

DIGITS = datasets.load("generated", Path(), train_size=1, test_size=40).test_images


def enlarged(digit: NDArray[np.uint8], factor: int, left: int, top: int) -> NDArray[np.uint8]:
    """A digit scaled up and placed in a larger black picture."""
    large = Image.fromarray(digit).resize((28 * factor, 28 * factor), Image.Resampling.BICUBIC)
    background = Image.new("L", (28 * factor + left + 30, 28 * factor + top + 50), 0)
    background.paste(large, (left, top))
    return np.asarray(background)


def alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Correlation of two images' pixels, moved by up to one pixel, since a centre may round either way."""
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moved = [np.roll(one, move, (0, 1)).ravel() for move in moves]
    return max(float(np.corrcoef(pixels, other.ravel())[0, 1]) for pixels in moved)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 39), st.integers(2, 9), st.integers(0, 300), st.integers(0, 300), st.booleans())
def test_in_the_box_and_centred(which: int, factor: int, left: int, top: int, inverted: bool) -> None:
    large = enlarged(DIGITS[which], factor, left, top)
    got = image_files.to_mnist_format(255 - large if inverted else large)
    rows, columns = np.flatnonzero(got.any(1)), np.flatnonzero(got.any(0))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert extent == image_files.BOX
    assert got.max() == 255
    centres: list[float] = [float(np.average(np.arange(28), weights=got.sum(axis))) for axis in (1, 0)]
    for centre, places in zip(centres, (rows, columns), strict=True):
        assert abs(centre - 14) <= 0.51 or places[0] == 0 or places[-1] == 27  # else no room to move
    assert alike(got, image_files.to_mnist_format(255 - DIGITS[which])) > 0.75


def test_what_is_in_the_form_already_stays_as_it_is() -> None:
    for digit in DIGITS:
        assert np.array_equal(image_files.to_mnist_format(digit), digit)


def test_a_photo(tmp_path: Path) -> None:
    """Ink on paper in uneven light, with noise, blur and a speck."""
    rng = np.random.default_rng(0)
    for digit in DIGITS[:10]:
        ink = enlarged(digit, 6, 40, 60) / 255
        light = np.linspace(0.9, 0.6, ink.shape[1])[None, :]
        paper = light * (1 - 0.6 * ink) + rng.normal(0, 0.015, ink.shape)
        paper[20:23, 20:23] = 0.3
        photo = Image.fromarray((255 * paper.clip(0, 1)).astype(np.uint8)).convert("RGB")
        photo.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "photo.jpg", quality=75)
        got = image_files.to_mnist_format(image_files.read_grey(tmp_path / "photo.jpg"))
        assert alike(got, image_files.to_mnist_format(255 - digit)) > 0.75


def test_files_of_many_kinds_read_the_same(tmp_path: Path) -> None:
    grey = 255 - enlarged(DIGITS[0], 4, 10, 10)
    expected = image_files.to_mnist_format(grey)
    whole = Image.fromarray(grey)
    clear = Image.new("RGBA", whole.size, (0, 0, 0, 0))
    clear.paste(Image.new("RGBA", whole.size, "black"), mask=Image.fromarray(255 - grey))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    for name, image in {"a.png": whole, "b.bmp": whole, "c.webp": clear, "d.tif": sixteen}.items():
        image.save(tmp_path / name, lossless=True)  # an option of WebP only
        assert alike(image_files.to_mnist_format(image_files.read_grey(tmp_path / name)), expected) > 0.999
    assert alike(image_files.to_mnist_format(grey, ink="dark"), expected) == pytest.approx(1)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png is not a picture"):
        image_files.read_grey(tmp_path / "text.png")
    Image.fromarray(DIGITS[0]).save(tmp_path / "photo.eps")  # PostScript, which another program would run
    (tmp_path / "photo.eps").rename(tmp_path / "photo.png")
    with pytest.raises(DataError, match=r"photo\.png is not a picture"):
        image_files.read_grey(tmp_path / "photo.png")
    Image.fromarray(DIGITS[0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    with pytest.raises(DataError, match=r"cut\.png"):
        image_files.read_grey(tmp_path / "cut.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="too many pixels"):
        image_files.read_grey(tmp_path / "bomb.png")
    for blank in (np.zeros((28, 28)), np.full((90, 60), 255), np.full((28, 28), 130)):
        with pytest.raises(ValueError, match="nothing is drawn"):
            image_files.to_mnist_format(blank.astype(np.uint8))


def test_tiny_pictures_and_what_begins_like_an_idx_file(tmp_path: Path) -> None:
    tiny = np.array([[255, 255], [0, 255]], np.uint8)
    with pytest.raises(ValueError, match="nothing is drawn in it"):
        image_files.to_mnist_format(tiny)
    Image.fromarray(DIGITS[0]).resize((32, 32)).save(tmp_path / "icon.ico")
    assert (tmp_path / "icon.ico").read_bytes()[:2] == b"\0\0"
    assert not predict._is_idx(tmp_path / "icon.ico")
    idx.write(tmp_path / "idx", DIGITS)
    assert predict._is_idx(tmp_path / "idx")


def test_several_digits_are_refused() -> None:
    refused = 0
    for one, other in zip(DIGITS[:20], DIGITS[20:], strict=True):
        cut = [digit[:, digit.any(0)] for digit in (one, other)]
        pair = np.pad(np.hstack([cut[0], np.zeros((28, 3), np.uint8), cut[1]]), 4)
        try:
            image_files.to_mnist_format(255 - np.kron(pair, np.ones((4, 4), np.uint8)))
        except ValueError as error:
            assert "several digits are drawn in it" in str(error)
            refused += 1
    assert refused >= 18


def test_files_that_are_like_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (60, 60), 255)
    image.paste(0, (25, 10, 35, 50))
    image.save(tmp_path / "a.tga", compression="tga_rle")  # starts with two zeros, like IDX files
    assert (tmp_path / "a.tga").read_bytes()[:2] == b"\0\0"
    values = np.asarray(image, np.float32) / 255
    Image.fromarray(values).save(tmp_path / "b.tiff")  # from 0 to 1
    for name in ("a.tga", "b.tiff"):
        assert not predict._is_idx(tmp_path / name)
        assert np.abs(image_files.read_grey(tmp_path / name).astype(int) - np.asarray(image)).max() <= 1

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to decode")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(DataError, match=r"b\.tiff is damaged: Failed to decode"):
        image_files.read_grey(tmp_path / "b.tiff")


def test_folders_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "a2.png", "a10.png", "notes.txt"):
        (tmp_path / name).write_text("")
    names = [path.name for path in predict._find_files(tmp_path)]
    assert names == ["9.png", "10.png", "a2.png", "a10.png"]


def test_as_text() -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[0, :4] = [0, 255, 0, 255]
    pixels[1, :4] = [0, 0, 255, 255]
    lines = as_text(pixels).plain.split("\n")
    assert lines == [" ▀▄█", *[""] * 13]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "run"
    recipe = ("--recipe", "classic", "--model", "mlp", "--epochs", 6, "--batch-size", 32)
    train("--dataset", "idx", "--data", digits, *recipe, nproc=1, out=out)
    return out


def test_pictures_folders_and_idx_files_agree(run: Path, digits: Path, tmp_path: Path) -> None:
    (path,) = digits.glob("t10k-images*")
    images = idx.read(path)[:30]
    (tmp_path / "sub").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "sub" / f"{i:02}.png")
    idx.write(tmp_path / "images-idx3-ubyte", images)
    (tmp_path / "images.gz").write_bytes(gzip.compress((tmp_path / "images-idx3-ubyte").read_bytes()))
    answers = []
    for what in ("sub", "images-idx3-ubyte", "images.gz"):
        ended = here("predict", run, tmp_path / what, "--top", "3", "--json", "--device", "cpu")
        assert ended.code == 0, ended
        output = json.loads(ended.stdout)
        assert output["unusable"] == 0
        answers.append([image["top"] for image in output["images"]])
        for image in output["images"]:
            assert len(image["top"]) == 3
            assert image["confidence"] == max(one["confidence"] for one in image["top"])
    assert answers[0] == answers[1] == answers[2]
    labels = idx.read(next(digits.glob("t10k-labels*")))[:30]
    right = sum(top[0]["label"] == label for top, label in zip(answers[0], labels.tolist(), strict=True))
    assert right >= 20


def test_lines_for_people(run: Path, tmp_path: Path) -> None:
    stroke = Image.new("L", (120, 200), "white")
    ImageDraw.Draw(stroke).line([(60, 30), (60, 170)], fill="black", width=16)
    stroke.save(tmp_path / "one.png")
    Image.new("L", (40, 40), "white").save(tmp_path / "blank.png")
    ended = here("predict", run, tmp_path / "blank.png", tmp_path / "one.png", "--show", "--device", "cpu")
    assert ended.code == 3
    first, *shown = ended.stdout.splitlines()
    assert first.split()[:2] == [str(tmp_path / "one.png"), "1"]
    assert sum("█" in line for line in shown) >= 9
    assert f"{tmp_path}/blank.png: nothing is drawn in it" in ended.stderr
    assert "1 of 2 pictures could not be used" in ended.stderr


def test_errors_name_what_is_wrong(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in here("predict", run, tmp_path / "empty", "--device", "cpu").stderr
    idx.write(tmp_path / "labels", np.zeros(5, np.uint8))
    ended = here("predict", run, tmp_path / "labels", "--device", "cpu")
    assert ended.code == 3
    assert "not uint8 images of 28 by 28" in ended.stderr
    assert "needs pictures" in here("predict", run).stderr


def test_a_large_picture_is_converted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can hold many pixels, and each may take 24 bytes on the way."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (50, 30, 4), np.uint8))
    colours.save(tmp_path / "rgba.png")
    colours.convert("RGB").quantize(16).save(tmp_path / "palette.gif")
    Image.fromarray(rng.integers(0, 65536, (50, 30)).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(rng.random((50, 30), np.float32)).save(tmp_path / "float.tif")
    files = sorted(tmp_path.iterdir())
    whole = [image_files.read_grey(file) for file in files]
    monkeypatch.setattr(image_files, "_PIXELS_AT_ONCE", 100)
    for file, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(image_files.read_grey(file), expected)
    monkeypatch.undo()
    Image.fromarray(np.zeros((3000, 4000), np.uint16)).save(tmp_path / "large.png")
    tracemalloc.start()
    image_files.read_grey(tmp_path / "large.png")
    assert tracemalloc.get_traced_memory()[1] < 130e6  # 288 MB for all pixels at once
    tracemalloc.stop()
