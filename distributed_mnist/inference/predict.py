"""`dmnist predict`: classify pictures of digits, with a confidence for each."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..common.placement import ALONE
from ..common.regular_file import open_regular
from ..config import MNIST_SHAPE, Device, ImageShape, describe_shape, stored_shape
from ..data import idx
from ..distributed.devices import choose_device
from ..errors import DataError, UsageError, write_line
from ..reporting.console import make_console, print_json
from . import image_files
from .trained import Trained, find_checkpoint, restore

_BATCH = 256
_LOW_CONFIDENCE = 0.8
"""Below this confidence a person should check the prediction."""
_MAX_NAME_WIDTH = 60
_IDX_TYPES = bytes([0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E])  # possible values of an IDX file's third byte
_HALF_BLOCKS = " ▀▄█"
_SHOWN_SIDE = 40


@dataclass(frozen=True)
class Picture:
    """One picture, prepared for the network."""

    path: Path
    index: int | None
    """The image's index in an IDX file; None for other files."""
    pixels: NDArray[np.uint8]
    """`(h, w)` or `(h, w, 3)`, as the network takes it."""
    resized_from: tuple[int, int] | None = None
    """The picture's height and width, if it was only scaled to those of the network's images."""

    @property
    def name(self) -> str:
        """The name to print."""
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"


def run(
    *,
    checkpoint: Path,
    images: Sequence[Path],
    top: int,
    ink: image_files.Ink,
    show: bool,
    model: str | None,
    device: Device,
    as_json: bool,
) -> int:
    """Classify pictures and print the predictions. Returns the exit code.

    Raises `CheckpointError`, and `DataError` at the end if any picture was unusable.
    """
    torch_device = choose_device(ALONE, device)
    trained = restore(find_checkpoint(checkpoint), model=model, device=torch_device)
    if ink != "auto" and trained.image_shape != MNIST_SHAPE:
        shape = describe_shape(trained.image_shape)
        raise UsageError(
            f"--ink is for networks that take digits like MNIST's; this one takes images of {shape}"
        )
    console = make_console(stderr=as_json)
    files = [file for path in images for file in _find_files(path)]
    name_width = min(max((len(str(file)) for file in files), default=0), _MAX_NAME_WIDTH)
    results: list[dict[str, Any]] = []
    unusable = 0
    pictures = _read_pictures(files, trained.image_shape, ink)
    while batch := list(islice(pictures, _BATCH)):
        usable = [item.pixels for item in batch if isinstance(item, Picture)]
        predictions = iter(classify(trained, usable, top) if usable else [])
        for item in batch:
            if not isinstance(item, Picture):
                write_line(item)
                unusable += 1
                continue
            prediction = next(predictions)
            if as_json:
                scaled = {"resized_from": item.resized_from} if item.resized_from else {}
                results.append({"path": str(item.path), "index": item.index, **scaled, **prediction})
            else:
                _print_prediction(console, item, prediction, name_width)
            if show:
                console.print(as_text(item.pixels, colour=console.color_system is not None), soft_wrap=True)
    if as_json:
        print_json(
            {
                "model": trained.recipe.model,
                "checkpoint": trained.path,
                "dataset": trained.dataset,
                "weights_sha256": trained.weights_sha256,
                "images": results,
                "unusable": unusable,
            }
        )
    if unusable:
        raise DataError(f"{unusable} of {len(files)} pictures could not be used")
    return 0


def classify(trained: Trained, images: list[NDArray[np.uint8]], top: int = 1) -> list[dict[str, Any]]:
    """Classify images `(h, w)` or `(h, w, 3)`. Returns a dictionary for each.

    It holds the `class` (a name), its `label` (an index), its `confidence` (0 to 1), and in `top` a list of
    the `top` most likely classes in the same form.
    """
    probabilities = trained.probabilities(torch.from_numpy(np.stack(images))).cpu()
    top_values, top_labels = probabilities.topk(min(top, probabilities.shape[1]))
    predictions = []
    for values, labels in zip(top_values.tolist(), top_labels.tolist(), strict=True):
        most_likely = [
            {"class": trained.class_names[label], "label": label, "confidence": value}
            for value, label in zip(values, labels, strict=True)
        ]
        predictions.append({**most_likely[0], "top": most_likely})
    return predictions


def as_text(pixels: NDArray[np.uint8], *, colour: bool = True) -> Text:
    """Draw pixels `(h, w)` or `(h, w, 3)` with half-block characters, two rows of pixels in a line.

    A picture larger than `_SHOWN_SIDE` is scaled down. With `colour`, a colour picture keeps its colours;
    otherwise the characters show which pixels are light.
    """
    height, width = pixels.shape[:2]
    scale = min(1, _SHOWN_SIDE / max(height, width))
    shown = image_files.resized(pixels, (1, max(1, round(height * scale)), max(1, round(width * scale))))
    shown = np.concatenate([shown, np.zeros_like(shown[: len(shown) % 2])])  # an even number of rows
    if shown.ndim == 3 and colour:
        lines = [
            Text.assemble(
                *(("▀", Style(color=_rgb(up), bgcolor=_rgb(low))) for up, low in zip(*rows, strict=True))
            )
            for rows in zip(shown[0::2].tolist(), shown[1::2].tolist(), strict=True)
        ]
        return Text("\n").join(lines)
    lit = ((shown if shown.ndim == 2 else shown.mean(2)) > 127).astype(int)
    shades = lit[0::2] + 2 * lit[1::2]
    return Text(
        "\n".join("".join(_HALF_BLOCKS[shade] for shade in row).rstrip() for row in shades.tolist())
    )


def _rgb(colour: Sequence[int]) -> Color:
    return Color.from_rgb(*colour)


def _find_files(path: Path) -> list[Path]:
    """The file itself, or all pictures in a folder and its subfolders.

    Raises `DataError` if the folder has none.
    """
    if not path.is_dir():
        return [path]
    suffixes = set(Image.registered_extensions())
    files = [file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        raise DataError(f"{path} has no pictures in it")
    return sorted(files, key=_natural_order)


def _natural_order(path: Path) -> list[tuple[str, int]]:
    """A sort key that puts 2.png before 10.png."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _read_pictures(
    files: Iterable[Path], shape: ImageShape, ink: image_files.Ink
) -> Iterator[Picture | str]:
    """Yield the pictures in these files in a network's shape, and an error message for each unusable one.

    Only digits like MNIST's are cut out and placed as there; other pictures are scaled as a whole.
    """
    for file in files:
        try:
            if _is_idx(file):
                yield from _read_idx(file, shape)
            elif shape != MNIST_SHAPE:
                pixels = image_files.read_picture(file, shape[0])
                scaled = image_files.resized(pixels, shape)
                height, width = pixels.shape[:2]
                yield Picture(file, None, scaled, None if scaled is pixels else (height, width))
            else:
                yield Picture(file, None, image_files.to_mnist_format(image_files.read_grey(file), ink))
        except DataError as error:
            yield str(error)
        except ValueError as error:
            yield f"{file}: {error}"


def _is_idx(path: Path) -> bool:
    """Whether a file is IDX or gzip, by its first bytes. No picture starts with either."""
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except OSError:
        return False  # reading it as a picture will report the error
    is_raw_idx = len(start) == 4 and start[:2] == b"\0\0" and start[2] in _IDX_TYPES and start[3] > 0
    return is_raw_idx or start[:2] == b"\x1f\x8b"


def _read_idx(path: Path, shape: ImageShape) -> Iterator[Picture]:
    images = idx.read(path)
    if images.dtype != np.uint8 or images.shape[1:] != stored_shape(shape):
        wanted = f"not uint8 images of {describe_shape(shape)}"
        raise DataError(f"{path} holds {images.dtype} {images.shape}, {wanted}")
    for index, pixels in enumerate(images):
        yield Picture(path, index, pixels)


def _print_prediction(
    console: Console, picture: Picture, prediction: dict[str, Any], name_width: int
) -> None:
    line = Text(f"{picture.name:<{name_width}}  ")
    for i, candidate in enumerate(prediction["top"]):
        confidence = candidate["confidence"]
        line.append("   " if i else "")
        line.append(candidate["class"], "dim" if i else "bold")
        line.append(f"  {confidence:6.2%}", "yellow" if i == 0 and confidence < _LOW_CONFIDENCE else "")
    if picture.resized_from:
        height, width = picture.resized_from
        line.append(f"   (resized from {width} wide and {height} high)", "dim")
    console.print(line, soft_wrap=True)
