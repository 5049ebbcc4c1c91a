"""Write and read checkpoints: one file holds the whole state of a run at one step.

Writing is atomic, and reading detects damaged and malicious files. The file is what `torch.save` writes.
It contains a digest of its own content, so a flipped bit is detected. It is loaded with
`weights_only=True`, so an untrusted file cannot run code.
"""

import functools
import io
import math
import platform
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import installed
from ..common.atomic_write import written_aside
from ..common.compute_platform import this_platform
from ..common.digest import digest
from ..common.regular_file import read_regular
from ..config import MNIST_SHAPE
from ..errors import CheckpointError, reason
from . import original_format
from .untrusted import require_bounded, sanitize

FORMAT = 1
_MAX_SIDE = 1 << 16  # pixels
_MAX_BYTES = 16 << 30  # Adam's state of a model with a billion parameters

Content = dict[str, Any]
"""A checkpoint in memory. Keys: `format`, `model` (raw state dict), `optimizer`, `scales` (of exact
arithmetic; otherwise empty), `step`, `best_accuracy`, `best_step`, `evaluations_since_best`,
`best_weights`, `samples_sha256`, `totals`, `train_seconds`, `recipe`, `dataset` (name, class_names,
image_shape, mean, std, sha256), `steps_per_epoch`, `versions`."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "scales": torch.Tensor,
    "step": int,
    "best_accuracy": (int, float),
    "best_step": int,
    "evaluations_since_best": int,
    "best_weights": dict,
    "samples_sha256": str,
    "totals": dict,
    "train_seconds": (int, float),
    "recipe": dict,
    "dataset": dict,
    "steps_per_epoch": int,
    "versions": dict,
}
_ADDED_LATER: Content = {
    "best_step": 0,
    "evaluations_since_best": 0,
    "best_weights": {},
    "scales": torch.zeros(0),
}
"""What a checkpoint of an earlier version, or of the original script, lacks."""
_DATASET_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "class_names": list,
    "image_shape": list,
    "mean": float,
    "std": float,
    "sha256": str,
}
_TOTALS_TYPES: dict[str, type | tuple[type, ...]] = {
    "loss": (int, float),
    "correct": (int, float),
    "images": (int, float),
}


def snapshot(value: Any) -> Any:
    """Copy a checkpoint's content, with tensors on the CPU, so that further training does not change it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(inner) for inner in value)
    return value


def encode(content: Content) -> bytes:
    """Return the bytes of a checkpoint file, including the digest of the content."""
    buffer = io.BytesIO()
    torch.save({**content, "content_sha256": digest(content)}, buffer)
    return buffer.getvalue()


def decode_weights(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """Return the weights by name in a checkpoint file, or in a file that has only a state dict.

    Raises `CheckpointError`.
    """
    loaded = _load(data, name)
    if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    return decode(data, name)["model"]


def decode(data: bytes, name: str) -> Content:
    """Return the content of a checkpoint file, with tensors on the CPU. `name` appears in error messages.

    It also reads the original script's checkpoints, see `original_format.from_original`.
    Raises `CheckpointError` for anything but a complete, undamaged checkpoint.
    """
    loaded = _load(data, name)
    claimed = loaded.pop("content_sha256", None)
    if original_format.is_original(loaded) and claimed is None and "dmnist" not in loaded:
        return {**_ADDED_LATER, **original_format.from_original(loaded, name)}
    if claimed is None and not {"format", "samples_sha256", "dmnist"} & loaded.keys():
        raise CheckpointError(f"{name} is not a checkpoint of dmnist: another program wrote it")
    try:
        damaged = digest(loaded) != claimed
    except Exception:
        damaged = True
    if damaged:
        raise CheckpointError(f"{name} is damaged: its content does not match its digest")
    if original_format.is_original(loaded):
        loaded = original_format.from_original(loaded, name)
    version = loaded.get("format")
    if type(version) is not int or version != FORMAT:
        printable = version is None or isinstance(version, int | str)
        shown = repr(version) if printable else f"a {type(version).__name__}"
        raise CheckpointError(f"{name} has format {shown}; this version reads {FORMAT}")
    loaded = {**_ADDED_LATER, **loaded}
    _require_types(loaded, _TYPES, name)
    loaded["dataset"].setdefault("image_shape", list(MNIST_SHAPE))  # earlier versions had no other
    _require_dataset(loaded["dataset"], name)
    _require_types(loaded["totals"], _TOTALS_TYPES, name)
    scales = loaded["scales"]
    if scales.ndim != 1 or scales.dtype != torch.float32 or not ((scales >= 0) & scales.isfinite()).all():
        raise CheckpointError(f"{name} has invalid scales")
    if not all(isinstance(text, str) for pair in loaded["versions"].items() for text in pair):
        raise CheckpointError(f"{name} has versions that are not text")
    if not 0 <= loaded["step"] < 2**63 or not re.fullmatch("[0-9a-f]{64}", loaded["samples_sha256"]):
        raise CheckpointError(f"{name} has an invalid step or sample digest")
    return loaded


def _require_dataset(dataset: dict[Any, Any], name: str) -> None:
    """Raise `CheckpointError` unless the description of a data set has valid values."""
    _require_types(dataset, _DATASET_TYPES, name)
    valid_names = all(isinstance(class_name, str) for class_name in dataset["class_names"])
    if not valid_names or not math.isfinite(dataset["mean"]) or not 0 < dataset["std"] < math.inf:
        raise CheckpointError(
            f"{name} has invalid class names, or an invalid mean or deviation of the pixels"
        )
    shape = dataset["image_shape"]
    if len(shape) != 3 or not all(type(size) is int and 0 < size <= _MAX_SIDE for size in shape):
        raise CheckpointError(f"{name} has an invalid shape of the images")


def _load(data: bytes, name: str) -> dict[Any, Any]:
    """Load a file from an untrusted source, with tensors on the CPU. Raises `CheckpointError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one-line error below already describes the problem
            loaded = torch.load(io.BytesIO(sanitize(data)), map_location="cpu", weights_only=True)
        require_bounded(loaded, len(data))
    except Exception as error:  # torch raises many types for damaged files
        problem = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            problem = "it holds more than tensors and plain values, and loading those could run code"
        raise CheckpointError(f"{name} is damaged or not a checkpoint: {problem}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{name} is not a checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def _require_types(values: dict[Any, Any], types: dict[str, type | tuple[type, ...]], name: str) -> None:
    """Raise `CheckpointError` unless every key exists and has the expected type.

    The digest does not guarantee this: it shows that a file is undamaged, not that this program wrote it.
    """
    missing = [key for key in types if key not in values]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}")
    for key, expected in types.items():
        if not isinstance(values[key], expected) or isinstance(values[key], bool):
            raise CheckpointError(f"{name}: its {key} is of type {type(values[key]).__name__}")


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises `CheckpointError`, naming the path, if that fails."""
    try:
        return read_regular(path, _MAX_BYTES)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except MemoryError:
        raise CheckpointError(f"{path}: does not fit into memory") from None


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path` completely or not at all, even in a power cut. Raises `OSError`."""
    with written_aside(path) as part:
        part.write_bytes(data)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Load a state dict into a model. Raises `CheckpointError` if it belongs to a different model."""
    require_weights(model, weights, name)
    model.load_state_dict(weights)


def require_weights(model: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Raise `CheckpointError` unless a state dict has the names, shapes and types of a model's."""
    expected = model.state_dict()
    different = sorted(map(str, expected.keys() ^ weights.keys()))
    if different:
        raise CheckpointError(
            f"{name} is from a different model: only one of the two has {', '.join(different[:4])}"
        )
    for key, value in expected.items():
        if not isinstance(weights[key], torch.Tensor):
            raise CheckpointError(f"{name} is from a different model: {key} is not a tensor")
        shapes = tuple(weights[key].shape), tuple(value.shape)
        for found, needed in (shapes, (weights[key].dtype, value.dtype)):
            if found != needed:
                raise CheckpointError(f"{name} is from a different model: {key} is {found}, not {needed}")


@functools.cache
def versions(device: torch.device) -> dict[str, str]:
    """Return what to store in a checkpoint about this process: a different build can give different bits.

    `device` is where it computes.
    """
    return {
        "dmnist": installed.version("distributed-mnist"),
        "python": platform.python_version(),
        **asdict(this_platform(device)),
    }
