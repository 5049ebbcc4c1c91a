"""Choose how many processes to start on this host when the user does not say."""

import sys
from pathlib import Path

from ..common.placement import physical_cores
from ..config import Recipe, Run

# Approximate time of forward and backward on one core. Only used to choose a default: see
# docs/explanation/performance.md.
MICROSECONDS_PER_IMAGE = {"linear": 3, "mlp": 20, "cnn-small": 20, "cnn": 120, "cnn-large": 300}
_MICROSECONDS_PER_PROCESS = 1_200  # with less work in a step, another process costs more than it saves


def default_nproc(recipe: Recipe, options: Run) -> int:
    """Return the number of processes: one per accelerator, or on CPU as many as speed up training.

    On CPU this is one per physical core, at most the number of shards (in exact arithmetic, of images), and
    only as many as have enough work in a step to outweigh the all-reduce of gradients. Of two numbers with
    which the busiest process has equally many shards it is the smaller one: 4 rather than 6 for 8 shards.
    """
    most = recipe.batch_size if recipe.precision == "exact" else recipe.shards
    accelerators = 0 if options.device == "cpu" else _count_accelerators()
    if accelerators:
        return min(accelerators, most)
    step_microseconds = recipe.batch_size * MICROSECONDS_PER_IMAGE.get(
        recipe.model, MICROSECONDS_PER_IMAGE["cnn"]
    )
    nproc = max(1, min(physical_cores(), most, step_microseconds // _MICROSECONDS_PER_PROCESS))
    if recipe.precision == "exact":
        return nproc
    largest_part = -(-recipe.shards // nproc)
    return -(-recipe.shards // largest_part)


def trial_nproc(device: str) -> int:
    """Return how many processes test a host: one per accelerator, or on CPU 2 to 4, one per core."""
    accelerators = 0 if device == "cpu" else _count_accelerators()
    return accelerators or min(max(physical_cores(), 2), 4)


def _count_accelerators() -> int:
    """Return the number of accelerators that torch can use.

    It imports torch, which takes a second, only if a device file shows that there may be one.
    """
    device_files = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")
    if sys.platform != "darwin" and not any(Path(file).exists() for file in device_files):
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
