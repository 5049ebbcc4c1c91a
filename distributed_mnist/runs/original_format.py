"""Convert checkpoints from and to the original script's format.

The original writes `epoch` (the next epoch), `state_dict` (of the wrapped model: `module.fc.weight`,
`module.fc.bias`), `best_acc` and `optimizer`. A file that we write in this format has the same four keys
and, under `dmnist`, the rest of the state, which an exact resume needs.
"""

from typing import Any

from ..errors import CheckpointError

_KEYS = ("epoch", "state_dict", "best_acc", "optimizer")
_PREFIX = "module."


def is_original(loaded: dict[Any, Any]) -> bool:
    """Return whether a loaded file is in the original script's format."""
    return all(key in loaded for key in _KEYS)


def to_original(content: dict[str, Any]) -> dict[str, Any]:
    """Convert one of our checkpoints, from the end of an epoch, to the original script's format."""
    rest = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    groups = [{**group, "fused": None} for group in content["optimizer"]["param_groups"]]
    return {
        "epoch": content["step"] // content["steps_per_epoch"],
        "state_dict": {_PREFIX + key: value for key, value in content["model"].items()},
        "best_acc": content["best_accuracy"],
        # `fused` selects an implementation of Adam, which the reader's torch or device may not support.
        "optimizer": {"state": content["optimizer"]["state"], "param_groups": groups},
        "dmnist": rest,
    }


def from_original(loaded: dict[str, Any], name: str) -> dict[str, Any]:
    """Convert a file in the original script's format to one of our checkpoints.

    If the original script wrote the file, only the epoch is known: `recipe` and `dataset` are then None,
    and `step` is -1. Raises `CheckpointError` if the values do not have the types that the script writes.
    """
    weights, epoch = loaded["state_dict"], loaded["epoch"]
    if (
        not isinstance(weights, dict)
        or not all(isinstance(key, str) for key in weights)
        or not isinstance(loaded.get("dmnist", {}), dict)
        or not isinstance(epoch, int)
        or not isinstance(loaded["best_acc"], float | int)
    ):
        raise CheckpointError(f"{name} has the original script's keys, but values of the wrong types")
    rest = loaded.get("dmnist") or {"step": -1, "recipe": None, "dataset": None, "samples_sha256": None}
    return {
        **rest,
        "model": {key.removeprefix(_PREFIX): value for key, value in weights.items()},
        "optimizer": loaded["optimizer"],
        "epoch": epoch,
        "best_accuracy": float(loaded["best_acc"]),
    }
