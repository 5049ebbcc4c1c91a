"""torch's fused kernels in a process whose torch has other defaults."""

import importlib.util

import pytest
import torch

from distributed_mnist.optim import fused


def test_the_default_device_at_the_time_of_import_changes_nothing() -> None:
    """A notebook may call `torch.set_default_device("cuda")` first, and then train on the CPU."""
    spec = importlib.util.find_spec(fused.__name__)
    assert spec is not None
    assert spec.loader is not None
    imported = importlib.util.module_from_spec(spec)
    with torch.device("meta"):
        spec.loader.exec_module(imported)
    weight, mean, square = torch.ones(3), torch.zeros(3), torch.zeros(3)
    step = torch.zeros(())
    imported.adam_(
        [weight], [torch.ones(3)], [mean], [square], [step], [0.1], betas=(0.9, 0.999), weight_decay=0.0
    )
    assert step.item() == 1
    assert weight.tolist() == pytest.approx([0.9] * 3)
