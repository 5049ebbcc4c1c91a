"""The default number of processes."""

import pytest

from distributed_mnist.config import Recipe, Run
from distributed_mnist.launcher import default_nproc


@pytest.mark.parametrize(
    ("cores", "recipe", "nproc"),
    [
        (1, Recipe(), 1),
        (4, Recipe(), 4),
        (64, Recipe(), 8),  # no more than shards
        (64, Recipe(shards=16), 16),
        (7, Recipe(), 4),  # with 5 to 7, one still has two of the 8 shards
        (3, Recipe(), 3),
        (12, Recipe(shards=16), 8),
        (64, Recipe(model="cnn-small", batch_size=512), 8),  # `fast`
        (64, Recipe(precision="exact"), 25),  # shards mean nothing there
        (7, Recipe(precision="exact"), 7),
        (64, Recipe(model="linear"), 1),  # too little work in a step
        (64, Recipe(model="linear", batch_size=8_192), 8),
        (4, Recipe(model="package.module:factory"), 4),  # unknown: assumed to be large
        (4, Recipe(batch_size=1), 1),
    ],
)
def test_default_number_of_processes(
    cores: int, recipe: Recipe, nproc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_nproc, "physical_cores", lambda: cores)
    assert default_nproc.default_nproc(recipe, Run(device="cpu")) == nproc


def test_default_number_of_processes_with_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_nproc, "physical_cores", lambda: 2)
    monkeypatch.setattr(default_nproc, "_count_accelerators", lambda: 4)
    assert default_nproc.default_nproc(Recipe(model="linear"), Run()) == 4
    assert default_nproc.default_nproc(Recipe(shards=3), Run()) == 3
    assert default_nproc.default_nproc(Recipe(), Run(device="cpu")) == 2


def test_every_accelerator_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_nproc, "physical_cores", lambda: 16)
    for devices, wanted in ((0, 4), (1, 1), (2, 2), (8, 8)):
        monkeypatch.setattr(default_nproc, "_count_accelerators", lambda devices=devices: devices)
        assert default_nproc.trial_nproc("auto") == wanted
        assert default_nproc.trial_nproc("cpu") == 4
