"""Image files as grey pixels, and as what MNIST's makers would have made of them.

They scaled a digit into a box of 20 by 20 pixels, its proportions kept, and placed that in 28 by 28 by its
centre of mass (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). Before that the digit
has to be found here: white on black or black on white, on a plain ground or on a photo of paper.
"""

import itertools
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage

from ..errors import DataError, reason

Ink = Literal["auto", "dark", "light"]
SIDE, BOX = 28, 20
_SIDE = 200
"""Larger pictures are made smaller first: a digit's strokes are still many pixels wide."""
_SPECK = 0.05
"""Pieces of less than this share of the largest are dirt."""
_LARGE, _TALL = 0.3, 0.6
"""A piece may be a digit of its own if it has this share of the largest's pixels, and of the height."""
_FAINT = 0.15
"""Share of the full contrast below which a picture is taken to be blank."""


def read(path: Path) -> NDArray[np.uint8]:
    """The file's grey values `(height, width)`, transparency on white, turned as its camera was held.

    Raises `DataError` for what is no image, damaged, or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                return np.asarray(_grey(upright))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path} has too many pixels to be a picture of a digit") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path} is not an image of a known format") from None
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from None
    except (ValueError, SyntaxError, RuntimeError) as error:  # what Pillow raises for some damaged files
        raise DataError(f"{path} is damaged: {error}") from None


def normalised(grey: NDArray[np.uint8], ink: Ink = "auto") -> NDArray[np.uint8]:
    """A picture `(height, width)` of one digit as MNIST's are: `(28, 28)`, white on black.

    A picture of MNIST's size with a black border is taken to be in that form already, and comes back as it
    is. Raises `ValueError` where nothing is drawn, or several digits are.
    """
    if grey.shape == (SIDE, SIDE) and ink != "dark" and _is_black_around(grey):
        if not grey.any():
            raise ValueError("nothing is drawn in it")
        return grey
    drawn = _strokes(grey, ink)
    rows, columns = _extent(drawn)
    if 2 * max(len(drawn[rows]), len(drawn[:, columns].T)) < max(drawn.shape) and max(grey.shape) > _SIDE:
        # A small digit in a large picture has lost its detail: look again, closer.
        scale = max(grey.shape) / max(drawn.shape)
        closer = grey[_around(rows, scale, grey.shape[0]), _around(columns, scale, grey.shape[1])]
        drawn = _strokes(closer, ink)
        rows, columns = _extent(drawn)
    cut = drawn[rows, columns]
    if _several(cut):
        raise ValueError("several digits are drawn in it, and a network tells one: cut them apart")
    return _placed(cut)


def _extent(drawn: NDArray[np.float64]) -> tuple[slice, slice]:
    """The rows and the columns that something is drawn in."""
    places = [np.flatnonzero(drawn.any(axis)) for axis in (1, 0)]
    return slice(places[0][0], places[0][-1] + 1), slice(places[1][0], places[1][-1] + 1)


def _around(part: slice, scale: float, length: int) -> slice:
    """The same stretch of a picture `scale` times as large, with some ground on both sides."""
    margin = (part.stop - part.start) * scale / 2 + 8
    return slice(max(0, int(part.start * scale - margin)), min(length, int(part.stop * scale + margin)))


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of grey; on white where it is transparent."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16 bits and more: Pillow would cut them off
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)
        top = 65535.0 if highest > 255 else 1.0 if image.mode == "F" and highest <= 1 else 255.0
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, clear).convert("L")
    return image.convert("L")


def _is_black_around(grey: NDArray[np.uint8]) -> bool:
    """Whether the outermost pixels are black, but for a stroke that may end there."""
    return float((_border(grey) <= 16).mean()) >= 0.75


def _border(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _strokes(grey: NDArray[np.uint8], ink: Ink) -> NDArray[np.float64]:
    """The digit, 0 (ground) to 1 (ink), noise and uneven light taken away. Raises `ValueError` if blank."""
    image = Image.fromarray(grey)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(image, dtype=np.float64) / 255
    around = float(np.median(_border(np.asarray(image))) / 255)
    light = ink == "light" or (ink == "auto" and _is_light_on_dark(values, around))
    values = values if light else 1 - values
    above = values - _ground(values)
    contrast = _brightest(above)
    if contrast < _FAINT:
        raise ValueError("nothing is drawn in it")
    shown = (above / contrast).clip(0, 1)
    threshold = _otsu(shown)
    mask = _without_specks(shown > threshold)
    if not mask.any():
        raise ValueError("nothing is drawn in it")
    # Grey edges belong to the strokes: what is near them stays as it is, all else is ground.
    near = np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    return np.where(near & (shown > threshold / 8), shown, 0.0)


def _is_light_on_dark(values: NDArray[np.float64], around: float) -> bool:
    """The ground is what the border shows; the ink is far from it, on one side."""
    return _brightest(values) - around > around + _brightest(-values)


def _brightest(values: NDArray[np.float64]) -> float:
    """The highest value but for so few that they may be noise."""
    few = min(values.size, max(8, values.size // 2000))
    return float(np.partition(values.ravel(), -few)[-few])


def _ground(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The light that falls on the paper, `(height, width)`: a plane fitted to all that is not ink.

    Fitted again and again without what stands out from it, so that the strokes do not lift it.
    """
    height, width = values.shape
    down, across = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones(values.size), down.ravel() / height, across.ravel() / width], axis=1)
    flat = values.ravel()
    low, high = float(flat.min()), float(flat.max())
    kept = flat <= low + (high - low) * _otsu((flat - low) / max(high - low, 1e-9))
    plane = terms[:, 0] * float(np.median(flat[kept]))
    for _ in range(5):
        if kept.sum() < 10:
            break
        plane = terms @ np.linalg.lstsq(terms[kept], flat[kept], rcond=None)[0]
        rest = flat - plane
        spread = max(float(np.median(np.abs(rest[kept]))), 0.005)
        kept = rest < 4 * spread
    # Noise above the ground is not ink.
    spread = float(np.median(np.abs((flat - plane)[kept]))) if kept.any() else 0.0
    return (plane + 3 * spread).reshape(values.shape)


def _otsu(values: NDArray[np.float64]) -> float:
    """The threshold that separates two classes best (Otsu, "A threshold selection method from gray-level
    histograms", 1979), of values 0 to 1."""
    counts, edges = np.histogram(values, bins=64, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1:][np.nanargmax(np.where(above > 0, between, -1))])


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without connected pieces that are tiny beside the largest, and without what keeps to the border."""
    labelled: Any = ndimage.label(mask, np.ones((3, 3)))
    pieces, count = labelled
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    inner = np.bincount(pieces[2:-2, 2:-2].ravel(), minlength=count + 1)
    sizes[inner == 0] = 0  # a frame, or the edge of the paper
    return (sizes >= max(_SPECK * sizes.max(), 1))[pieces]


def _several(cut: NDArray[np.float64]) -> bool:
    """Whether there are pieces side by side that are each large enough to be a digit.

    None of MNIST's 10,000 test images is taken for several; of pairs of them 98 of 100 are.
    """
    labelled: Any = ndimage.label(cut > 0.4, np.ones((3, 3)))
    pieces, count = labelled
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    tall = _TALL * len(cut)
    columns = [
        across
        for (down, across), size in zip(ndimage.find_objects(pieces), sizes, strict=True)
        if size >= _LARGE * sizes.max() and down.stop - down.start >= tall
    ]
    columns.sort(key=lambda across: across.start)
    return any(one.stop < other.start for one, other in itertools.pairwise(columns))


def _placed(cut: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A digit cut out, 0 to 1, scaled into the box and placed by its centre of mass."""
    height, width = cut.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    whole = Image.fromarray((255 * cut).round().astype(np.uint8))
    small = np.asarray(whole.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))
    small = small * (255 / max(int(small.max()), 1))  # thin strokes fade when they are made smaller
    middle = SIDE / 2  # where it lies in MNIST, on average
    top, left = (
        int(np.clip(round(middle - float(centre)), 0, SIDE - extent))
        for centre, extent in zip(ndimage.center_of_mass(small), small.shape, strict=True)
    )
    placed = np.zeros((SIDE, SIDE), np.uint8)
    placed[top : top + small.shape[0], left : left + small.shape[1]] = small.round()
    return placed
