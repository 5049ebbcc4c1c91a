"""Choose the device on which a rank computes."""

import torch

from ..common.placement import Placement
from ..errors import LaunchError
from .rendezvous import tell_failure


def find_accelerator(device: str) -> torch.device | None:
    """Return what accelerator this host has, without an index; None to use the CPU.

    `device` is one of `config.Device`. Raises `LaunchError` if it demands another kind of accelerator.
    """
    if device == "cpu":
        return None
    found = torch.accelerator.current_accelerator(check_available=True)
    if device not in ("auto", found.type if found else None):
        instead = (
            f"its accelerator is {found.type}" if found else "dmnist doctor shows the devices it can use"
        )
        raise LaunchError(
            f"--device {device}: torch {torch.__version__} finds none on this host; {instead}"
        )
    return found


def choose_device(placement: Placement, device: str, *, shared: bool = False) -> torch.device:
    """Return this rank's device: its accelerator, or the CPU. `device` is one of `config.Device`.

    Raises `LaunchError` if the host has not the accelerator that `device` demands, or more processes than
    accelerators, unless they may be `shared`. Two ranks on one GPU are slower than one, and NCCL refuses
    them with a less helpful message. The other ranks are told.
    """
    try:
        return _choose_device(placement, device, shared)
    except Exception as error:
        tell_failure(placement, error)
        raise


def _choose_device(placement: Placement, device: str, shared: bool) -> torch.device:
    try:
        kind = find_accelerator(device)
    except LaunchError as error:
        error.on_one_rank = placement.local_rank == 0  # the other ranks on this host raise the same error
        raise
    if kind is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = 0 if placement.own_device and count == 1 else placement.local_rank
    if shared:
        index %= count
    elif index >= count or (placement.local_size > count and not placement.own_device):
        error = LaunchError(
            f"{placement.local_size} processes on this host but {count} {kind.type.upper()} device"
            f"{'s' if count > 1 else ''}: start at most {count}, or let them share "
            f"{'these' if count > 1 else 'it'} with dmnist train --oversubscribe"
        )
        error.on_one_rank = placement.local_rank == 0
        raise error
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
