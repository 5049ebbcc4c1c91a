"""How many processes to start on this host when nobody said."""

import sys
from pathlib import Path

from ..common.placement import usable_cores
from ..config import Recipe, Run

# Roughly, on one core, forward and backward; and the work in a step below which a second process costs more
# than it saves. Only used to choose a default: see docs/explanation/performance.md.
MICROSECONDS_PER_IMAGE = {"linear": 3, "mlp": 10, "cnn-small": 20, "cnn": 120, "cnn-large": 300}
_WORTH_A_PROCESS = 1_500


def default_nproc(recipe: Recipe, options: Run) -> int:
    """Processes to start where nobody said: one per accelerator, or on CPU as many as pay off.

    On CPU that is one per core, up to the number of shards, as long as each has work enough in a step to
    outweigh the exchange of gradients.
    """
    accelerators = 0 if options.device == "cpu" else _count_accelerators()
    if accelerators:
        return min(accelerators, recipe.shards)
    step_microseconds = recipe.batch_size * MICROSECONDS_PER_IMAGE.get(
        recipe.model, MICROSECONDS_PER_IMAGE["cnn"]
    )
    return max(1, min(usable_cores(), recipe.shards, step_microseconds // _WORTH_A_PROCESS))


def trial_nproc(device: str) -> int:
    """Processes to try exchanges between: one per accelerator, or on CPU per core, 2 to 4 of them."""
    accelerators = 0 if device == "cpu" else _count_accelerators()
    return min(accelerators or max(usable_cores(), 2), 4)


def _count_accelerators() -> int:
    """Devices that torch can use; asks torch, whose import takes a second, only where there may be one."""
    signs = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")
    if sys.platform != "darwin" and not any(Path(sign).exists() for sign in signs):
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
