"""One file that holds a whole run at one step: written so that it is never torn, read so that damage and
malice are noticed.

The file is what `torch.save` writes. It carries a digest of its own content, so a flipped bit does not
pass, and it is loaded with `weights_only=True`, so a stranger's file cannot run code.
"""

import functools
import io
import math
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import installed
from ..common.atomic_write import written_aside
from ..common.digest import digest
from ..errors import CheckpointError, reason
from ..optim.muon import Muon
from ..optim.optimizers import Adam, Optimizer
from . import original_format
from .untrusted import require_bounded, sound

FORMAT = 1

_NEEDED = {"step", "exp_avg", "exp_avg_sq"}  # of Adam's state of a parameter

Content = dict[str, Any]
"""A checkpoint in memory. Keys: `format`, `model` (raw state dict), `optimizer`, `step`, `best_accuracy`,
`samples_sha256`, `totals`, `train_seconds`, `recipe`, `dataset` (name, classes, class_names, mean,
std, sha256), `steps_per_epoch`, `versions`."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "step": int,
    "best_accuracy": (int, float),
    "samples_sha256": str,
    "totals": dict,
    "train_seconds": (int, float),
    "recipe": dict,
    "dataset": dict,
    "steps_per_epoch": int,
    "versions": dict,
}
_DATASET_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "class_names": list,
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
    """A copy of a content, tensors on the CPU, that goes on being of this moment while training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [snapshot(inner) for inner in value]
    return value


def encode(content: Content) -> bytes:
    """The file's bytes, content digest included."""
    buffer = io.BytesIO()
    torch.save({**content, "content_sha256": digest(content)}, buffer)
    return buffer.getvalue()


def decode(data: bytes, name: str) -> Content:
    """The content of a file's bytes, tensors on the CPU. `name` is named in errors.

    Also reads the original script's checkpoints, see `original.from_original`.
    Raises `CheckpointError` for anything that is not a whole checkpoint.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with it is said once, in the error's one line
            loaded = torch.load(io.BytesIO(sound(data)), map_location="cpu", weights_only=True)
        require_bounded(loaded, len(data))
    except Exception as error:  # torch raises many types for damaged files; all mean the same here
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds more than tensors and plain values, and loading those could run code"
        raise CheckpointError(f"{name} is damaged or no checkpoint: {reason}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{name} is no checkpoint: it holds a {type(loaded).__name__}")
    claimed = loaded.pop("content_sha256", None)
    if original_format.is_original(loaded) and claimed is None and "dmnist" not in loaded:
        return original_format.from_original(loaded, name)
    try:
        damaged = digest(loaded) != claimed
    except Exception:
        damaged = True
    if damaged:
        raise CheckpointError(f"{name} is damaged: its content does not have the digest it claims")
    if original_format.is_original(loaded):
        loaded = original_format.from_original(loaded, name)
    found = loaded.get("format")
    if type(found) is not int or found != FORMAT:
        shown = (
            repr(found) if found is None or isinstance(found, int | str) else f"a {type(found).__name__}"
        )
        raise CheckpointError(f"{name} has format {shown}; this version reads {FORMAT}")
    _require_types(loaded, _TYPES, name)
    _require_types(loaded["dataset"], _DATASET_TYPES, name)
    _require_types(loaded["totals"], _TOTALS_TYPES, name)
    named = all(isinstance(label, str) for label in loaded["dataset"]["class_names"])
    if not named or not 0 < loaded["dataset"]["std"] < math.inf:
        raise CheckpointError(
            f"{name} has impossible names of classes, or an impossible deviation of pixels"
        )
    if loaded["step"] < 0 or not re.fullmatch("[0-9a-f]{64}", loaded["samples_sha256"]):
        raise CheckpointError(f"{name} has an impossible step or digest of samples")
    return loaded


def _require_types(values: dict[Any, Any], types: dict[str, type | tuple[type, ...]], name: str) -> None:
    """The digest tells that a file is whole, not that we wrote it."""
    missing = [key for key in types if key not in values]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}")
    for key, expected in types.items():
        if not isinstance(values[key], expected) or isinstance(values[key], bool):
            raise CheckpointError(f"{name}: its {key} is a {type(values[key]).__name__}")


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises `CheckpointError` naming what is wrong with the path."""
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all; it survives a power cut. Raises `OSError`."""
    with written_aside(path) as part:
        part.write_bytes(data)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put a state dict into a model. Raises `CheckpointError` if it is another model's."""
    mine = model.state_dict()
    different = sorted(map(str, mine.keys() ^ weights.keys()))
    if different:
        raise CheckpointError(
            f"{name} is of another model: {', '.join(different[:4])} found on one side only"
        )
    for key, value in mine.items():
        if not isinstance(weights[key], torch.Tensor):
            raise CheckpointError(f"{name} is of another model: {key} is no tensor")
        if weights[key].shape != value.shape:
            shapes = f"{tuple(weights[key].shape)} there, {tuple(value.shape)} here"
            raise CheckpointError(f"{name} is of another model: {key} is {shapes}")
        if weights[key].dtype != value.dtype:
            types = f"{_name(weights[key].dtype)} there, {_name(value.dtype)} here"
            raise CheckpointError(f"{name} is of another model: {key} is {types}")
    model.load_state_dict(weights)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], name: str) -> None:
    """Put an optimizer's saved state into one of the same kind; rates and the like stay the recipe's."""
    current = optimizer.state_dict()
    try:
        count = sum(len(group["params"]) for group in saved["param_groups"])
        if count != sum(len(group["params"]) for group in current["param_groups"]):
            raise ValueError("it has another number of parameters")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        needed = [_needed(optimizer, group) for group in optimizer.param_groups for _ in group["params"]]
        for i, of_one in saved["state"].items():
            if lacking := {key for key in needed[i] if of_one.get(key) is None}:
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        state = {
            i: {k: _like(parameters[i], k, v) for k, v in s.items()} for i, s in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{name}: its optimizer state does not fit: {error}") from error


def _needed(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """What a step takes for granted in the state of this group's parameters."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer"} if group["matrices"] else _NEEDED
    return _NEEDED if isinstance(optimizer, Adam) else set()


def _like(parameter: torch.Tensor, key: str, value: Any) -> Any:
    """Fused optimizers go through memory by the parameter's layout and check nothing."""
    if key == "step":
        return torch.as_tensor(value, dtype=torch.float32).reshape(()).clone()
    if value is None:
        return value
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        raise ValueError(f"{key} is not of its parameter's shape")
    return torch.empty_like(parameter).detach().copy_(value)


@functools.cache
def versions() -> dict[str, str]:
    """What made a checkpoint: the same recipe can end in other bits under another build."""
    return {
        "dmnist": installed.version("distributed-mnist"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
