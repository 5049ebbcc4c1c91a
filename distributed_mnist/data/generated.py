"""Draw any number of digits without files or a network, the same on every machine.

`draw(60_000, "train", seed)` returns images and labels in MNIST's format. A digit is a path of pen strokes
(`strokes`) whose points are shaken, slanted and bent at random, connected by a smooth curve, fitted to
MNIST's box of 20 by 20 pixels, centred by mass, and drawn with a soft round pen.

**Every bit is the same everywhere.** A sum of floats depends on the order of its terms, which libraries
choose by processor, and `exp` and `sin` differ in their last bit. Therefore, everything that is summed here
(curves, centres, ink) consists of integers that are small enough for floats to hold every partial sum
exactly. All other arithmetic is element-wise `+ - * /` and `sqrt`, which IEEE 754 defines to the last bit.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common import random_keys
from .strokes import PATHS

SIDE = 28
CLASSES = len(PATHS)

_CHUNK = 256  # images drawn at once: few enough to fit in the processor's cache
_CONTROLS = 16  # maximum number of points in a path
_SAMPLES = 48  # points at which the pen touches the paper, about 1 pixel apart
_SHAPE_WORDS = 20  # random words for the drawing as a whole, in addition to two for each point
_WORDS = _SHAPE_WORDS + 2 * _CONTROLS  # per image; `random_keys.random_bits` needs a multiple of 4

_GRID = 16  # control points are integers in 1/16 of a path's unit
_BASIS = 512  # spline weights are integers in 1/512
_SUBPIXEL = 16  # the pen is placed to 1/16 pixel

# How much handwriting varies: the largest deviation to either side. The distribution is uniform, because
# the rare extremes of a normal distribution would be illegible while most digits were still too easy. The
# values are chosen so that models rank about as on MNIST.
_SHAKE = 6.2  # of each point, in path units
_BEND = 0.34  # of each bending coefficient, for a drawing that reaches from -1 to 1
_WIDTH = 0.4  # of the width, as a factor
_TURN = 0.36  # of the tangent of the angle
_SLANT = 0.6  # of the horizontal shift per height; the mean is 0.2, to the right

_BOX = 20.0  # pixels into which a digit is fitted
_MIDDLE = 14.5  # position of the centre of mass, plus or minus half a pixel, as in MNIST
_INK = 10.0  # weight of a touch per pixel of path and unit of pressure
_PEN_RADII = (2.6, 2.9, 3.2, 3.6)  # pixels from the middle of a touch to the end of its ink: hard to soft
_PEN_PEAK = 64  # ink in the middle of a touch: 64 along x times 64 along y
_MAX_WEIGHT = 85  # of a touch: 48 * 85 * 64 * 64 < 2**24, so float32 sums of ink are exact
_TONE_SHIFT = 2.0**-8  # ink to grey value; a power of two, so exact
_TONE_START = 4_500.0  # with less ink than this, a pixel stays black


class _Glyphs(NamedTuple):
    """All variants of all digits, as arrays. Digit `label` has the glyphs `first[label] + k`,
    `k < variants[label]`."""

    first: NDArray[np.uint64]  # (10,)
    variants: NDArray[np.uint64]  # (10,)
    controls: NDArray[np.float64]  # (glyphs, 2, _CONTROLS): x and y from the middle, in path units
    basis: NDArray[np.float32]  # (glyphs, _CONTROLS, 2 * _SAMPLES): integers; positions, then steps


def draw(count: int, *key_parts: int | str, start: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw the digits `start` to `start + count - 1` of the set with this key.

    Returns images, uint8 `(count, 28, 28)`, white (255) on black (0), and labels, uint8 `(count,)`, 0 to 9.
    Image `i` depends only on the key and `i`, so any process can draw any part of a set in any order.
    Raises ValueError if `count` or `start` is negative.
    """
    if count < 0 or start < 0:
        raise ValueError(f"count and start must not be negative, not {count} and {start}")
    images = np.empty((count, SIDE, SIDE), np.uint8)
    labels = np.empty(count, np.uint8)
    for begin in range(0, count, _CHUNK):
        end = min(begin + _CHUNK, count)
        bits = random_keys.random_bits((end - begin) * _WORDS, *key_parts, start=(start + begin) * _WORDS)
        images[begin:end], labels[begin:end] = _draw_chunk(bits.reshape(-1, _WORDS))
    return images, labels


def _draw_chunk(bits: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images `(n, 28, 28)` and labels `(n,)` for random words `(n, _WORDS)`."""
    glyphs = _glyphs()
    labels = bits[:, 0] % np.uint64(CLASSES)
    glyph = glyphs.first[labels] + bits[:, 1] % glyphs.variants[labels]
    pen = bits[:, 2] % np.uint64(len(_PEN_RADII))
    shape = 2.0 * random_keys.uniform(bits[:, 3:_SHAPE_WORDS].T) - 1.0
    shake = 2.0 * random_keys.uniform(bits[:, _SHAPE_WORDS:]).reshape(-1, 2, _CONTROLS) - 1.0
    rough = bits[:, -_SAMPLES:]  # `_roughen` uses the last bits of each word, `uniform` the upper 53

    controls = _bend(glyphs.controls[glyph] + _SHAKE * shake, shape)
    curve = np.matmul(np.rint(controls * _GRID).astype(np.float32), glyphs.basis[glyph])
    places, weights = _fit(curve.astype(np.float64), shape, pen)
    return _ink(_roughen(places, rough), weights, pen), labels.astype(np.uint8)


def _bend(controls: NDArray[np.float64], shape: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make points `(n, 2, _CONTROLS)` wider or narrower, bend them by parabolas, turn and slant them."""
    width, *bend, turn, slant = shape[:9, :, None]
    x, y = controls[:, 0] * 0.02, controls[:, 1] * 0.02  # within about -1 to 1
    x, y = (
        (1.08 + _WIDTH * width) * x + _BEND * (bend[0] * x * y + bend[1] * y * y + bend[2] * x * x),
        y + _BEND * (bend[3] * x * y + bend[4] * y * y + bend[5] * x * x),
    )
    turn, slant = _TURN * turn, 0.2 + _SLANT * slant
    return np.stack((x - (slant + turn) * y, y + turn * x), axis=1) * 50.0


def _fit(
    curve: NDArray[np.float64], shape: NDArray[np.float64], pen: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return where and how heavily the pen touches the paper, fitted to MNIST's box.

    The positions are integers `(n, 2, _SAMPLES)` in subpixels, the weights `(n, _SAMPLES)`. The larger side
    of the drawing, ink included, becomes 20 pixels, and its centre of mass moves to the middle of the
    image, as in MNIST. A touch weighs in proportion to the length of the piece of path that it represents.
    """
    heavy, taper, swell = shape[9:12, :, None]
    place, step = curve[:, :, :_SAMPLES], curve[:, :, _SAMPLES:]
    pressure = 0.9 + 0.6 * (heavy + 1.0) * (heavy + 1.0)
    ink_width = 0.8 * np.array(_PEN_RADII)[pen][:, None] + 0.4 * pressure
    size = (place.max(axis=2) - place.min(axis=2)).max(axis=1)[:, None]
    scale = (_BOX - ink_width) / size

    length = np.sqrt(step[:, 0] * step[:, 0] + step[:, 1] * step[:, 1]) * scale
    along = (2.0 * np.arange(_SAMPLES) + 1.0 - _SAMPLES) / _SAMPLES  # -1 to 1 from first touch to last
    pressure = pressure * (1.0 + 0.2 * taper * along + 0.25 * swell * (along * along - 0.5))
    weights = np.clip(np.rint(_INK * length * pressure), 0.0, _MAX_WEIGHT)

    fine = np.rint(place * (scale * _SUBPIXEL)[:, None])
    mass = (fine * weights[:, None]).sum(axis=2) / weights.sum(axis=1)[:, None]
    middle = _SUBPIXEL * (_MIDDLE + 0.5 * shape[12:14].T)
    return (fine + np.rint(middle - mass)[:, :, None]).astype(np.int64), weights.astype(np.float32)


def _roughen(places: NDArray[np.int64], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Move each touch by up to a quarter pixel in x and y, because real edges of ink are not smooth."""
    seven = np.uint64(7)
    return places + np.stack((bits & seven, bits >> np.uint64(3) & seven), axis=1).astype(np.int64) - 4


def _ink(
    places: NDArray[np.int64], weights: NDArray[np.float32], pen: NDArray[np.uint64]
) -> NDArray[np.uint8]:
    """Return images `(n, 28, 28)`: the sum of the touches' ink, clipped to 0 to 255.

    A round soft touch is a profile along y times a profile along x, so the sum is a matrix product.
    """
    profiles = _pen_profiles()
    rows = (
        np.clip(places, 0, SIDE * _SUBPIXEL - 1)
        + (pen.astype(np.int64) * (SIDE * _SUBPIXEL))[:, None, None]
    )
    down = profiles[rows[:, 1]] * weights[:, :, None]
    across = profiles[rows[:, 0]]
    ink = np.matmul(down.transpose(0, 2, 1), across)
    ink -= _TONE_START
    ink *= _TONE_SHIFT
    return np.clip(ink, 0.0, 255.0, out=ink).astype(np.uint8)


@functools.cache
def _pen_profiles() -> NDArray[np.float32]:
    """Return the ink on a line of 28 pixels for a touch at each of its subpixels.

    The result has integers `(pens * 28 * _SUBPIXEL, 28)`. The profile is (1 - (d/R)**2)**6, which is close
    to a Gaussian of standard deviation R / sqrt(12), ends at R, and needs no `exp`.
    """
    profiles = np.empty((len(_PEN_RADII), SIDE * _SUBPIXEL, SIDE), np.float32)
    place = (np.arange(SIDE * _SUBPIXEL)[:, None] + 0.5) / _SUBPIXEL
    for profile, radius in zip(profiles, _PEN_RADII, strict=True):
        distance = (np.arange(SIDE) + 0.5 - place) / radius
        square = np.maximum(1.0 - distance * distance, 0.0)
        profile[:] = np.rint(_PEN_PEAK * (square * square * square) * (square * square * square))
    return profiles.reshape(-1, SIDE)


@functools.cache
def _glyphs() -> _Glyphs:
    """Convert the paths in `strokes` to arrays."""
    variants = np.array([len(paths) for paths in PATHS], np.uint64)
    controls, basis = zip(*(_spline(path) for paths in PATHS for path in paths), strict=True)
    return _Glyphs(np.cumsum(variants) - variants, variants, np.stack(controls), np.stack(basis))


def _spline(path: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return a path's controls `(2, _CONTROLS)` and basis `(_CONTROLS, 2 * _SAMPLES)`, padded with zeros.

    `controls @ basis` gives the samples' positions on a Catmull-Rom spline through the points of each
    stroke, and the step from one sample to the next, both times `_BASIS`. Equal points are one control, so
    that strokes that meet still meet when they are shaken.
    """
    strokes = [stroke.split() for stroke in path.split("|")]
    names = list(dict.fromkeys(name for stroke in strokes for name in stroke))
    points = {name: (int(name[:2]) - 50, int(name[2:]) - 50) for name in names}
    controls = np.zeros((2, _CONTROLS))
    controls[:, : len(names)] = np.array([points[name] for name in names]).T

    segments = [
        (length, [names.index(name) for name in around])
        for stroke in strokes
        for around in _neighbours(stroke)
        for length in [_distance(points[around[1]], points[around[2]])]
    ]
    spacing = math.fsum(length for length, _ in segments) / _SAMPLES  # `sum` differs by Python version
    basis = np.zeros((_CONTROLS, 2, _SAMPLES))
    passed = 0.0  # length of the segments before this one
    segment = iter(segments)
    length, around = next(segment)
    for sample in range(_SAMPLES):
        while (sample + 0.5) * spacing > passed + length:
            passed += length
            length, around = next(segment)
        t = ((sample + 0.5) * spacing - passed) / length
        for control, place, speed in zip(around, _catmull_rom(t), _catmull_rom_speed(t), strict=True):
            basis[control, 0, sample] += place
            basis[control, 1, sample] += speed * spacing / length
    return controls, np.rint(basis * _BASIS).reshape(_CONTROLS, -1).astype(np.float32)


def _neighbours(stroke: list[str]) -> list[list[str]]:
    """Return, for each segment of a stroke, its two points and the points before and after it."""
    closed = stroke[0] == stroke[-1]
    before, after = (stroke[-2], stroke[1]) if closed else (stroke[0], stroke[-1])
    padded = [before, *stroke, after]
    return [padded[i : i + 4] for i in range(len(stroke) - 1)]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)


def _catmull_rom(t: float) -> tuple[float, float, float, float]:
    """Return the weights of four neighbouring points at `t`, from the second point (0) to the third (1)."""
    return (
        0.5 * (-t + 2 * t * t - t * t * t),
        0.5 * (2 - 5 * t * t + 3 * t * t * t),
        0.5 * (t + 4 * t * t - 3 * t * t * t),
        0.5 * (-t * t + t * t * t),
    )


def _catmull_rom_speed(t: float) -> tuple[float, float, float, float]:
    """Return the derivatives of `_catmull_rom`."""
    return (
        0.5 * (-1 + 4 * t - 3 * t * t),
        0.5 * (-10 * t + 9 * t * t),
        0.5 * (1 + 8 * t - 9 * t * t),
        0.5 * (-2 * t + 3 * t * t),
    )
