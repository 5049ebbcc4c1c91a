"""Digits drawn by the program itself: as many as you like, without a network, the same on every machine.

`draw(60_000, "train", seed)` gives images and labels in MNIST's format. A digit is a path of pen strokes
(`strokes`) whose points are shaken, slanted and bent at random, joined by a smooth curve, fitted to
MNIST's box of 20 by 20 pixels, centred by mass, and inked by a soft round pen.

**Every bit is the same everywhere.** A sum of floats depends on the order of its terms, and libraries
choose that order by processor; `exp` and `sin` differ in their last bit. So whatever is summed here
(curves, centres, ink) consists of integers small enough that floats hold every partial sum exactly, and
all other arithmetic is `+ - * /` and `sqrt`, element by element, which IEEE 754 defines to the last bit.
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

_CHUNK = 256  # images drawn at once: few enough to stay in the processor's cache
_CONTROLS = 16  # points that a path may have
_SAMPLES = 48  # points at which the pen touches the paper, about 1 pixel apart
_SHAPE_WORDS = 20  # random words for the drawing as a whole, beside two for each point
_WORDS = _SHAPE_WORDS + 2 * _CONTROLS  # per image; a multiple of 4, as `keys.random_bits` wants

_GRID = 16  # control points are integers in 1/16 of a path's unit
_BASIS = 512  # spline weights are integers in 1/512
_SUBPIXEL = 16  # the pen is placed to 1/16 pixel

# How much hands differ, to either side; evenly, because the rare extremes of a normal distribution would
# be illegible while the bulk was still too easy. Chosen so that models rank about as on MNIST.
_SHAKE = 6.2  # of each point, in units of a path
_BEND = 0.34  # of each coefficient of the bending, for a drawing that reaches from -1 to 1
_WIDTH = 0.4  # of the width, as a factor
_TURN = 0.36  # the tangent of the angle
_SLANT = 0.6  # of the run per height; the mean is 0.2, to the right

_BOX = 20.0  # pixels into which a digit is fitted
_MIDDLE = 14.5  # where its centre of mass goes, give or take half a pixel: MNIST has it there too
_INK = 10.0  # weight of a touch per pixel of path and unit of pressure
_PEN_RADII = (2.6, 2.9, 3.2, 3.6)  # pixels at which the ink of one touch ends: hard to soft
_PEN_PEAK = 64  # ink in the middle of a touch: 64 along x times 64 along y
_MAX_WEIGHT = 85  # of a touch: 48 * 85 * 64 * 64 < 2**24, so float32 adds ink exactly
_TONE_SHIFT = 2.0**-8  # ink to grey; a power of two, so exact
_TONE_START = 4_500.0  # ink below this leaves the paper black


class _Glyphs(NamedTuple):
    """All ways of writing all digits, as arrays: way `first[label] + k`, k below `ways[label]`."""

    first: NDArray[np.uint64]  # (10,)
    ways: NDArray[np.uint64]  # (10,)
    controls: NDArray[np.float64]  # (glyphs, 2, _CONTROLS): x and y in path units from the middle
    basis: NDArray[np.float32]  # (glyphs, _CONTROLS, 2 * _SAMPLES): integers; places, then steps


def draw(count: int, *key_parts: int | str, start: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Digits number `start` to `start + count - 1` of the set under this key.

    Returns images, uint8 `(count, 28, 28)`, white (255) on black (0), and labels, uint8 `(count,)`, 0 to 9.
    Image `i` depends on the key and `i` alone, so a set can be drawn in parts, by anyone, in any order.
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
    """Images `(n, 28, 28)` and labels `(n,)` from random words `(n, _WORDS)`."""
    glyphs = _glyphs()
    labels = bits[:, 0] % np.uint64(CLASSES)
    glyph = glyphs.first[labels] + bits[:, 1] % glyphs.ways[labels]
    pen = bits[:, 2] % np.uint64(len(_PEN_RADII))
    shape = 2.0 * random_keys.uniform(bits[:, 3:_SHAPE_WORDS].T) - 1.0
    shake = 2.0 * random_keys.uniform(bits[:, _SHAPE_WORDS:]).reshape(-1, 2, _CONTROLS) - 1.0
    rough = bits[:, -_SAMPLES:]  # `uniform` has used the upper 53 bits of each word, these take the last

    controls = _bend(glyphs.controls[glyph] + _SHAKE * shake, shape)
    curve = np.matmul(np.rint(controls * _GRID).astype(np.float32), glyphs.basis[glyph])
    places, weights = _fit(curve.astype(np.float64), shape, pen)
    return _ink(_roughen(places, rough), weights, pen), labels.astype(np.uint8)


def _bend(controls: NDArray[np.float64], shape: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points `(n, 2, _CONTROLS)` made wider or narrower, bent by parabolas, turned and slanted."""
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
    """Where the pen touches, integers `(n, 2, _SAMPLES)` in subpixels, and how heavily, `(n, _SAMPLES)`.

    The larger side of the drawing, ink included, becomes 20 pixels, and its centre of mass the middle of
    the image, as in MNIST. A touch weighs as much as the piece of path that it stands for is long.
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
    """Touches moved by up to a quarter pixel each way: paper and pen leave no edge quite smooth."""
    seven = np.uint64(7)
    return places + np.stack((bits & seven, bits >> np.uint64(3) & seven), axis=1).astype(np.int64) - 4


def _ink(
    places: NDArray[np.int64], weights: NDArray[np.float32], pen: NDArray[np.uint64]
) -> NDArray[np.uint8]:
    """Images `(n, 28, 28)`: the touches' ink added up, then limited to what paper can hold.

    A round soft touch is a profile along y times one along x, so that adding them all is a matrix product.
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
    """Ink of a touch at each subpixel of a line on its 28 pixels: integers `(pens * 28 * _SUBPIXEL, 28)`.

    (1 - (d/R)**2)**6 is close to a Gaussian of deviation R / sqrt(12), ends at R, and needs no `exp`.
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
    """The tables of `strokes`, ready for use."""
    ways = np.array([len(paths) for paths in PATHS], np.uint64)
    controls, basis = zip(*(_spline(path) for paths in PATHS for path in paths), strict=True)
    return _Glyphs(np.cumsum(ways) - ways, ways, np.stack(controls), np.stack(basis))


def _spline(path: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """One path's controls `(2, _CONTROLS)` and basis `(_CONTROLS, 2 * _SAMPLES)`, padded with zeros.

    `controls @ basis` gives the samples' places on a Catmull-Rom spline through the points of each stroke,
    and the step from one sample to the next, both times `_BASIS`. Equal points are one control, so
    that strokes which meet still meet when shaken.
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
    spacing = math.fsum(length for length, _ in segments) / _SAMPLES  # `sum` rounds by Python's version
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
    """For each piece of a stroke, from point to point, these two and the ones before and after."""
    closed = stroke[0] == stroke[-1]
    before, after = (stroke[-2], stroke[1]) if closed else (stroke[0], stroke[-1])
    padded = [before, *stroke, after]
    return [padded[i : i + 4] for i in range(len(stroke) - 1)]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)


def _catmull_rom(t: float) -> tuple[float, float, float, float]:
    """Weights of four neighbouring points at `t` between the second (0) and the third (1)."""
    return (
        0.5 * (-t + 2 * t * t - t * t * t),
        0.5 * (2 - 5 * t * t + 3 * t * t * t),
        0.5 * (t + 4 * t * t - 3 * t * t * t),
        0.5 * (-t * t + t * t * t),
    )


def _catmull_rom_speed(t: float) -> tuple[float, float, float, float]:
    """The derivatives of `_catmull_rom`."""
    return (
        0.5 * (-1 + 4 * t - 3 * t * t),
        0.5 * (-10 * t + 9 * t * t),
        0.5 * (1 + 8 * t - 9 * t * t),
        0.5 * (-2 * t + 3 * t * t),
    )
