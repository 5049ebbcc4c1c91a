"""Which device a rank computes on."""

import torch

from ..common.placement import Placement
from ..errors import LaunchError


def choose_device(placement: Placement) -> torch.device:
    """This rank's accelerator if the host has one for each of its ranks, the CPU if it has none.

    Raises `LaunchError` for more processes than devices: two ranks on one GPU would be slower than one,
    and NCCL refuses them with a less helpful message.
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
        error.on_one_rank = False  # the others find the same
        raise error
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
