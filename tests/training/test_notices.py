"""What a run says about its data before it starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_mnist.config import Recipe, Run
from distributed_mnist.data.split import Split
from distributed_mnist.training import notices
from distributed_mnist.training.notices import (
    empty_classes,
    oversubscription_warnings,
    unused_settings,
)


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ([0, 1, 2], "abc", None),
        ([0, 2], "abc", "no training image has the class b (classes are counted from 0)"),
        (
            [6],
            "abcdefg",
            "no training image has the class a, b, c, d and 2 more (classes are counted from 0)",
        ),
    ],
)
def test_classes_without_training_images_are_told(labels: list[int], names: str, said: str | None) -> None:
    train = Split(torch.zeros(len(labels), 28, 28), torch.tensor(labels, dtype=torch.uint8))
    data: Any = SimpleNamespace(train=train, validation=None, class_names=tuple(names), name="idx")
    assert empty_classes(data) == said
    data.train, data.validation = data.validation, data.train
    assert empty_classes(data, "validation") == (said and said.replace("training", "validation"))
    data.train = train
    data.name = "generated"
    assert empty_classes(data) is None


@pytest.mark.parametrize(
    ("processes", "threads", "said"),
    [
        (2, 1, []),
        (3, 1, ["3 processes share 2 cores: same answer, slower than --nproc 2"]),
        (2, 2, ["2 processes with 2 threads on 2 cores: same answer, slower than OMP_NUM_THREADS=1"]),
        (1, 4, ["1 process with 4 threads on 2 cores: same answer, slower than OMP_NUM_THREADS=2"]),
    ],
)
def test_more_threads_than_cores_are_told(
    processes: int, threads: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "usable_cores", lambda: 2)
    world: Any = SimpleNamespace(local_size=processes, device=torch.device("cpu"))
    assert oversubscription_warnings(world, threads) == said


def test_settings_that_mean_nothing_in_a_precision_are_told() -> None:
    exact = Recipe(precision="exact")
    assert unused_settings(Recipe(shards=3, sync="ddp"), Run()) == unused_settings(exact, Run()) == []
    both = unused_settings(exact.replace(shards=3, sync="ddp"), Run(balance="auto"))
    assert both == ["--sync ddp and --shards 3 change nothing with --precision exact"]
    auto = unused_settings(Recipe(), Run(balance="auto"))
    assert auto == ["--balance auto changes nothing without --precision exact"]
