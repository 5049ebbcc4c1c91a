"""Decode one picture of a data set: its pixels as they are, grey or in colour."""

import io
import warnings
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import DataError, reason

_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_MAX_PIXELS = 1 << 22
"""2048 by 2048: pictures for training are smaller. Limits what a small file can unpack to."""


def decode(file: BinaryIO | bytes, where: str) -> NDArray[np.uint8]:
    """Return a picture's pixels, `(h, w)` if it is grey throughout, otherwise `(h, w, 3)`.

    Transparent parts become white, and the camera's orientation is applied. `where` names the picture in
    messages. Raises DataError for anything but a picture of a moderate size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            with Image.open(opened, formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise DataError(f"{where}: {image.width} x {image.height} pixels are too many")
                return _pixels(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{where}: too many pixels") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{where}: not a picture of a known format ({', '.join(_FORMATS)})") from None
    except OSError as error:
        raise DataError(f"{where}: {reason(error)}") from None
    except (ValueError, SyntaxError, RuntimeError) as error:  # Pillow raises these for some damaged files
        raise DataError(f"{where}: damaged: {error}") from None


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "L" and not image.has_transparency_data and "exif" not in image.info:  # nearly always
        return np.asarray(image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels have the type {image.mode}, not 8 or 16 bits")
        return (values >> 8).astype(np.uint8) if values.max() > 255 else values.astype(np.uint8)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    colour = np.asarray(image.convert("RGB"))
    is_grey = (colour[..., 0] == colour[..., 1]).all() and (colour[..., 0] == colour[..., 2]).all()
    return colour[..., 0] if is_grey else colour
