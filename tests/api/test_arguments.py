"""What a caller passes to the API, and errors that name arguments, not flags of the command."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distributed_mnist
from distributed_mnist import DmnistError
from distributed_mnist.api.arguments import as_path, in_python, resolve_dataset
from distributed_mnist.data import datasets

# Without their types, which the calls below ignore.
train: Any = distributed_mnist.train
evaluate: Any = distributed_mnist.evaluate
load: Any = distributed_mnist.load
from_arrays: Any = distributed_mnist.from_arrays
GIVEN = datasets.load("generated", Path(), train_size=32, test_size=16)
ARRAYS: dict[str, Any] = {**GIVEN.arrays()}
PAIRS = TensorDataset(torch.zeros(4, 1, 28, 28), torch.zeros(4))
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
WANTED = (
    "dataset must be a name such as 'mnist', a folder with four IDX files, a pair of torch Datasets, or "
    "the result of from_arrays, "
)
EVALUATES = (
    "evaluate takes a run's folder, a checkpoint, the result of train or load, or a torch module, not "
)


def changed(**fields: Any) -> Any:
    return replace(GIVEN, **fields)


CALLS: dict[str, tuple[Any, str]] = {
    "pairs": (lambda: train(dataset=PAIRS), r"dataset is one torch Dataset, .* pass a pair .*random_split"),
    "a set": (lambda: train(dataset={1, 2}), WANTED + "which takes arrays or tensors; not a set"),
    "a class": (lambda: train(dataset=TensorDataset), WANTED + "which .*; not the class TensorDataset"),
    "no data": (lambda: train(dataset=None), WANTED + "which .*; not None"),
    "arrays": (lambda: train(dataset=(1, 2)), WANTED + "which .*; not a tuple"),
    "pairs to evaluate": (lambda: evaluate(NETWORK, PAIRS), "is one torch Dataset"),
    "a number to evaluate": (lambda: evaluate(5, GIVEN), EVALUATES + "5"),
    "a class to evaluate": (lambda: evaluate(nn.Linear, GIVEN), EVALUATES + "<class 'torch.*Linear'>"),
    "no weights": (lambda: evaluate(nn.Flatten(), GIVEN), r"the model returns shape \(16, 784\)"),
    "no test images": (
        lambda: train(
            dataset=changed(test_images=GIVEN.test_images[:0], test_labels=GIVEN.test_labels[:0])
        ),
        "test_images is empty: there must be at least one image",
    ),
    "nothing to evaluate on": (
        lambda: evaluate(NETWORK, changed(test_images=GIVEN.test_images[:0])),
        "test_images is empty",
    ),
    "floats": (
        lambda: train(dataset=changed(train_images=GIVEN.train_images / 255)),
        "must be uint8, pixels",
    ),
    "labels": (
        lambda: train(dataset=changed(train_labels=GIVEN.train_labels + 7)),
        "class_names has 10 names, but there is a label 16",
    ),
    "sizes": (
        lambda: train(dataset=changed(train_images=GIVEN.train_images[:, :20])),
        "test_images: images of 28 by 28, but train_images has images of 28 wide and 20 high",
    ),
    "counts": (
        lambda: train(dataset=changed(train_labels=GIVEN.train_labels[:3])),
        "32 images, train_labels 3",
    ),
    "deviation": (lambda: train(dataset=changed(std=0.0)), "std above 0, not .* and 0.0"),
    "empty": (lambda: from_arrays(**ARRAYS | {"test_images": []}), "test_images must be uint8|is empty"),
    "one-hot": (
        lambda: from_arrays(**ARRAYS | {"train_labels": np.eye(32)}),
        r"train_labels must be of shape \(n,\), not \(32, 32\); of one-hot rows take labels.argmax\(1\)",
    ),
    "ragged": (
        lambda: from_arrays(**ARRAYS | {"test_labels": [[1], [1, 2]]}),
        "test_labels must be an array",
    ),
    "names": (lambda: from_arrays(**ARRAYS, class_names=10), "class_names must be a list of names, not 10"),
    "loss": (lambda: train(loss=5), "loss must be a name or a function of logits and labels, not 5"),
    "event": (lambda: train(on_event=5), "on_event must be a function of an event, a dictionary, not 5"),
    "optimizer": (
        lambda: train(optimizer=torch.optim.Adam(NETWORK.parameters())),
        "optimizer must be a name or a function of parameters and lr, not a Adam",
    ),
    "recipe": (
        lambda: train({"lr": 1}),
        "recipe must be a name, a TOML file, a run's folder or a Recipe, not {'lr': 1}",
    ),
    "out": (lambda: train(out=5), "out must be a path, not 5"),
    "data": (lambda: train(data=None), "data must be a path, not None"),
    "resume": (lambda: train(resume=True), "resume must be a path, not True"),
    "path": (lambda: load(5), "path must be a path, not 5"),
    "nproc": (lambda: train(nproc=0), "nproc must be at least 1, not 0"),
    "shards": (lambda: train(nproc=100, dataset=GIVEN), "start at most 8, or use shards=100 or more"),
    "epochs": (lambda: train(epochs=0), "settings: epochs must be at least 1, not 0"),
    "auto": (lambda: train(resume="auto"), "resume='auto' needs out: the folder of the run to resume"),
    "size": (lambda: train(train_size=9), "train_size only goes with dataset='generated'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named_in_one_line(name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises(DmnistError, match=words) as caught:
        call()
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "--out x already holds a run: add --resume auto to resume it",
            "out x already holds a run: add resume='auto' to resume it",
        ),
        (
            "resume with --resume auto --out /runs/x.1; done",
            "resume with resume='auto', out='/runs/x.1'; done",
        ),
        ("--learning-rate 3 and --ensemble N stay", "--learning-rate 3 and --ensemble N stay"),
        ("--batch-size 9 there, 8 here, --lr 0.1 there", "batch_size=9 there, 8 here, lr=0.1 there"),
        ("if you trust it, add --model mine:net", "if you trust it, add model='mine:net'"),
        ("give --data DIR", "give data=..."),
    ],
)
def test_flags_become_arguments(text: str, expected: str) -> None:
    assert in_python(text) == expected


def test_the_error_keeps_its_class_and_its_cause(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "linear", "steps": 1, "dataset": GIVEN, "out": tmp_path / "run"}
    train(**settings)
    with pytest.raises(DmnistError, match=r"add resume='auto' to resume it") as caught:
        train(**settings)
    assert caught.value.exit_code == 6
    assert "add --resume auto" in str(caught.value.__cause__)


def test_several_processes_in_a_worker_of_a_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python forbids it: a daemonic process may have no children."""
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(
        DmnistError, match=r"^nproc above 1 does not work in a daemonic process, such as a worker"
    ):
        train(model="linear", dataset=GIVEN, nproc=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("epochs = 0")
    with pytest.raises(DmnistError, match="at least 1"):
        train("~/mine.toml")
    datasets.write(GIVEN, tmp_path / "digits")
    assert resolve_dataset("~/digits", "~/data") == (None, "idx", tmp_path / "digits")
    assert as_path("out", "~/run1") == tmp_path / "run1"
