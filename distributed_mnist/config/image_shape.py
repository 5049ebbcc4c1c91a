"""The shape of a data set's images, which also decides the shape of a network's weights."""

from collections.abc import Sequence

ImageShape = tuple[int, int, int]
"""Channels (1 for grey, 3 for colour), height and width in pixels."""

MNIST_SHAPE: ImageShape = (1, 28, 28)


def shape_of(stored: Sequence[int]) -> ImageShape:
    """Return the shape of the images in an array of shape `(n, h, w)` or, in colour, `(n, h, w, 3)`."""
    height, width, *channels = stored[1:]
    return (channels[0] if channels else 1), height, width


def stored_shape(shape: ImageShape) -> tuple[int, ...]:
    """Return the shape of an image as it is stored: `(h, w)` or, in colour, `(h, w, 3)`."""
    channels, height, width = shape
    return (height, width) if channels == 1 else (height, width, channels)


def describe_shape(shape: ImageShape) -> str:
    """Return a shape in words, such as `28 by 28` or `32 by 32 in colour`."""
    channels, height, width = shape
    size = f"{height} by {width}" if height == width else f"{width} wide and {height} high"
    return f"{size} in colour" if channels == 3 else size
