"""Read the weights from which a run starts (`--init-from`)."""

import io
from pathlib import Path

import torch
from torch import nn

from ..common.installed import install
from ..errors import CheckpointError, UsageError
from .checkpoint import decode, decode_weights, load_weights, read_bytes
from .layout import CHECKPOINTS, checkpoints_in


def read_initial_weights(path: Path) -> tuple[str, bytes]:
    """Return the name and the content of a file with the weights. Raises `CheckpointError`.

    `path` is a file, or the folder of a run, which stands for the weights in its newest checkpoint or, with
    a validation split, for the best ones so far, as everywhere else.
    """
    is_run = path.is_dir()
    if is_run:
        found = checkpoints_in(path / CHECKPOINTS)
        if not found:
            raise CheckpointError(f"--init-from {path}: the folder has no checkpoint of a run in it")
        path = found[-1]
    try:
        data = read_bytes(path)
    except CheckpointError as error:
        raise CheckpointError(f"--init-from {error}") from None
    if is_run and (best := decode(data, f"--init-from {path}")["best_weights"]):
        file = io.BytesIO()
        torch.save(best, file)
        return f"{path} (its best weights)", file.getvalue()
    return str(path), data


def load_initial_weights(model: nn.Module, name: str, data: bytes) -> None:
    """Load the content of a file called `name` into a model.

    The file is a checkpoint, or has only the weights by name, as `torch.save` or safetensors writes them.
    Raises `CheckpointError` for a file that has not exactly the weights of this model, or if they are
    not finite.
    """
    is_safetensors = name.endswith(".safetensors")
    weights = _of_safetensors(data, name) if is_safetensors else decode_weights(data, f"--init-from {name}")
    load_weights(model, weights, f"--init-from {name}")
    if bad := [key for key, value in model.state_dict().items() if not bool(value.isfinite().all())]:
        raise CheckpointError(f"--init-from {name}: its {bad[0]} has values that are not finite")


def _of_safetensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise UsageError(
            f"--init-from {name} needs the package safetensors: {install('safetensors')}"
        ) from None
    try:
        return load(data)
    except Exception as error:
        raise CheckpointError(
            f"--init-from {name} is damaged or not a safetensors file: {error}"
        ) from error
