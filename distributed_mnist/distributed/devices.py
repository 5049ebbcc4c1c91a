"""Choose the device on which a rank computes."""

import torch

from ..common.placement import Placement
from ..errors import LaunchError


def choose_device(placement: Placement) -> torch.device:
    """Return this rank's accelerator, or the CPU on a host without accelerators.

    Raises `LaunchError` if the host has more processes than devices. Two ranks on one GPU would be slower
    than one, and NCCL refuses them with a less helpful message.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    index = 0 if placement.own_device and count == 1 else placement.local_rank
    if index >= count or (placement.local_size > count and not placement.own_device):
        error = LaunchError(
            f"{placement.local_size} processes on this host but {count} {kind.type.upper()} device"
            f"{'s' if count > 1 else ''}: start at most {count}"
        )
        error.on_one_rank = False  # the other ranks on this host raise the same error
        raise error
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
