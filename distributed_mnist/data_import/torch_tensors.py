"""The files that torchvision once wrote for MNIST: `processed/training.pt` and `test.pt`."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from ..data.idx import one_line
from ..errors import DataError
from ..runs.untrusted import require_bounded, sanitize
from .part import Part, PartName, Progress, content, make_part


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read a pair of tensors, images and labels, without running any code that the file may hold."""
    path, where = paths[0], one_line(paths[0])
    progress("reading tensors", 0, None)
    data = content(path)
    try:
        loaded: Any = torch.load(io.BytesIO(sanitize(data)), map_location="cpu", weights_only=True)
        require_bounded(loaded, len(data))
    except pickle.UnpicklingError:
        raise DataError(f"{where}: damaged, or holds more than tensors, which could run code") from None
    except ValueError as error:  # `sanitize` and `require_bounded` say what is wrong
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # torch raises almost anything for a damaged file
        raise DataError(f"{where}: damaged ({one_line(' '.join(str(error).split())[:120])})") from None
    pair = loaded[:2] if isinstance(loaded, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(value, torch.Tensor) for value in pair):
        raise DataError(f"{where}: is no pair of tensors, images and labels")
    try:
        images, labels = (tensor.numpy() for tensor in pair)
    except (TypeError, RuntimeError):
        raise DataError(f"{where}: its tensors cannot be used: {pair[0].dtype}, {pair[1].dtype}") from None
    return make_part(where, images, labels)
