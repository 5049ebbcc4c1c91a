"""The original script's checkpoints, both ways.

It writes `epoch` (the next one), `state_dict` (of the wrapped model: `module.fc.weight`,
`module.fc.bias`), `best_acc` and `optimizer`. A file of ours in that form has the same four and, under
`dmnist`, what an exact resume needs besides.
"""

from typing import Any

from ..errors import CheckpointError

_KEYS = ("epoch", "state_dict", "best_acc", "optimizer")
_PREFIX = "module."


def is_original(loaded: dict[Any, Any]) -> bool:
    """Whether a loaded file has the original's form."""
    return all(key in loaded for key in _KEYS)


def to_original(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of ours at the end of an epoch, in the original's form."""
    rest = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    groups = [{**group, "fused": None} for group in content["optimizer"]["param_groups"]]
    return {
        "epoch": content["step"] // content["steps_per_epoch"],
        "state_dict": {_PREFIX + key: value for key, value in content["model"].items()},
        "best_acc": content["best_accuracy"],
        # Fused is how we compute Adam, not what it is: the reader's torch may not have it on its device.
        "optimizer": {"state": content["optimizer"]["state"], "param_groups": groups},
        "dmnist": rest,
    }


def from_original(loaded: dict[str, Any], name: str) -> dict[str, Any]:
    """A file in the original's form as a checkpoint of ours; `recipe` and `dataset` are None in one that
    the original wrote itself, and `step` is then -1: only the epoch is known.

    Raises `CheckpointError` if the values are not of the types the original writes.
    """
    weights, epoch = loaded["state_dict"], loaded["epoch"]
    if (
        not isinstance(weights, dict)
        or not all(isinstance(key, str) for key in weights)
        or not isinstance(loaded.get("dmnist", {}), dict)
        or not isinstance(epoch, int)
        or not isinstance(loaded["best_acc"], float | int)
    ):
        raise CheckpointError(f"{name} has the original script's keys, but not its values")
    rest = loaded.get("dmnist") or {"step": -1, "recipe": None, "dataset": None, "samples_sha256": None}
    return {
        **rest,
        "model": {key.removeprefix(_PREFIX): value for key, value in weights.items()},
        "optimizer": loaded["optimizer"],
        "epoch": epoch,
        "best_accuracy": float(loaded["best_acc"]),
    }
