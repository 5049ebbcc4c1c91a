"""`dmnist predict`: what is drawn in pictures, and how sure a network is of it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.text import Text

from ..common.placement import ALONE
from ..data import idx
from ..distributed.devices import choose_device
from ..errors import DataError, write_line
from ..reporting.console import make_console, print_json
from . import image_files
from .image_files import SIDE
from .trained import Trained, find, restore

_BATCH = 256
_UNSURE = 0.8
"""Below this confidence a person should look."""
_WIDE = 60
_IDX_TYPES = bytes([0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E])  # the third byte
_SHADES = " ▀▄█"


@dataclass(frozen=True)
class Item:
    """A picture as the network takes it: `(28, 28)` uint8, white on black."""

    path: Path
    index: int | None
    """Which image of an IDX file."""
    pixels: NDArray[np.uint8]

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.path) if self.index is None else f"{self.path}[{self.index}]"


def run(
    *,
    checkpoint: Path,
    images: Sequence[Path],
    top: int,
    ink: image_files.Ink,
    show: bool,
    model: str | None,
    device: Literal["auto", "cpu"],
    as_json: bool,
) -> int:
    """Classify these pictures and print what they show; the exit code.

    Raises `CheckpointError`, and at the end `DataError` for unusable pictures."""
    chosen = torch.device("cpu") if device == "cpu" else choose_device(ALONE)
    trained = restore(find(checkpoint), model=model, device=chosen)
    console = make_console(stderr=as_json)
    files = [file for path in images for file in _files(path)]
    wide = max((len(str(file)) for file in files), default=0)
    found: list[dict[str, Any]] = []
    unusable = 0
    for batch in _batches(_items(files, ink)):
        good = [one.pixels for one in batch if isinstance(one, Item)]
        answers = iter(classify(trained, good, top) if good else [])
        for one in batch:
            if not isinstance(one, Item):
                write_line(one)
                unusable += 1
                continue
            told = next(answers)
            if as_json:
                found.append({"path": str(one.path), "index": one.index, **told})
            else:
                _show(console, one, told, min(wide, _WIDE))
            if show:
                console.print(Text(as_text(one.pixels)), soft_wrap=True)
    if as_json:
        about = {"model": trained.recipe.model, "checkpoint": trained.path, "dataset": trained.dataset}
        print_json(
            {**about, "weights_sha256": trained.weights_sha256, "images": found, "unusable": unusable}
        )
    if unusable:
        raise DataError(f"{unusable} of {len(files)} pictures could not be used")
    return 0


def classify(trained: Trained, images: list[NDArray[np.uint8]], top: int = 1) -> list[dict[str, Any]]:
    """For each image `(28, 28)` its `class` (a name), `label` (its number), `confidence` (0 to 1), and the
    `top` likeliest as a list of the same."""
    probabilities = trained.logits(torch.from_numpy(np.stack(images))).softmax(1).cpu()
    values, labels = probabilities.topk(min(top, probabilities.shape[1]))
    answers = []
    for each, numbers in zip(values.tolist(), labels.tolist(), strict=True):
        likeliest = [
            {"class": trained.class_names[label], "label": label, "confidence": value}
            for value, label in zip(each, numbers, strict=True)
        ]
        answers.append({**likeliest[0], "top": likeliest})
    return answers


def as_text(pixels: NDArray[np.uint8]) -> str:
    """`(28, 28)` pixels as 14 lines of half blocks."""
    lit = (pixels > 127).astype(int)
    shades = lit[0::2] + 2 * lit[1::2]
    return "\n".join("".join(_SHADES[shade] for shade in row).rstrip() for row in shades.tolist())


def _files(path: Path) -> list[Path]:
    """The file itself, or the pictures in and below a folder. Raises `DataError` if there are none."""
    if not path.is_dir():
        return [path]
    known = set(Image.registered_extensions())
    found = [file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file()]
    if not found:
        raise DataError(f"{path} has no pictures in it")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[str, int]]:
    """Sorts 2.png before 10.png."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _items(files: Iterable[Path], ink: image_files.Ink) -> Iterator[Item | str]:
    """The pictures of these files, and of those that cannot be used what is wrong with them."""
    for file in files:
        try:
            if _is_idx(file):
                yield from _of_idx(file)
            else:
                yield Item(file, None, image_files.normalised(image_files.read(file), ink))
        except DataError as error:
            yield str(error)
        except ValueError as error:
            yield f"{file}: {error}"


def _batches(items: Iterator[Item | str]) -> Iterator[list[Item | str]]:
    while batch := list(islice(items, _BATCH)):
        yield batch


def _is_idx(path: Path) -> bool:
    """Whether a file is IDX or gzip by its first bytes; no picture begins like either."""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
        numbers = len(begin) == 4 and begin[:2] == b"\0\0" and begin[2] in _IDX_TYPES and begin[3] > 0
        return begin[:2] == b"\x1f\x8b" or numbers
    except OSError:
        return False  # told by whoever reads it as a picture


def _of_idx(path: Path) -> Iterator[Item]:
    images = idx.read(path)
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path} holds {images.dtype} {images.shape}, not images of {SIDE} by {SIDE} bytes")
    for index, pixels in enumerate(images):
        yield Item(path, index, pixels)


def _show(console: Console, item: Item, told: dict[str, Any], wide: int) -> None:
    line = Text(f"{item.name:<{wide}}  ")
    for i, one in enumerate(told["top"]):
        style = "bold" if i == 0 else "dim"
        sure = "" if one["confidence"] >= _UNSURE or i else "yellow"
        line += (
            Text("   " * bool(i)) + Text(one["class"], style) + Text(f"  {one['confidence']:6.2%}", sure)
        )
    console.print(line, soft_wrap=True)
