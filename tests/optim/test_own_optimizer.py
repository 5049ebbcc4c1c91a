"""Test a user's own optimizer: the same bits at any size and after a resume, or a clear refusal."""

from pathlib import Path

import pytest
import torch
from ranks import train
from torch import nn

from distributed_mnist.config import Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.optim.schedule import make_optimizer, set_learning_rate
from distributed_mnist.runs.checkpoint import decode

FLAGS = ("--model", "linear", "--batch-size", 40, "--steps", 8, "--schedule", "cosine", "--lr", 0.002)
OWN = ("--loss", "user_functions:focal", "--optimizer", "user_functions:Lion", "--ema", 0.8, "--clip", 0.1)


def test_any_size_and_resumed(digits: Path, tmp_path: Path) -> None:
    words = ("--dataset", "idx", "--data", digits, *FLAGS, *OWN)
    one = train(*words, "--checkpoint-every", 4, nproc=1, out=tmp_path / "one")
    start = tmp_path / "one" / "checkpoints" / "step_00000004.pt"
    three = train(*words, nproc=3, out=tmp_path / "three")
    resumed = train(*words, "--resume", start, nproc=2, out=tmp_path / "resumed")
    assert one["weights_sha256"] == three["weights_sha256"] == resumed["weights_sha256"]
    assert one["test_loss"] == resumed["test_loss"]
    groups = decode(start.read_bytes(), "it")["optimizer"]["param_groups"]
    assert 0 < groups[0]["lr"] < 0.002  # the schedule applies


def test_groups_keep_the_ratio_of_their_rates() -> None:
    optimizer = make_optimizer(Recipe(optimizer="user_functions:two_rates", lr=0.5), nn.Linear(3, 2))
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.2])


def test_torchs_adam_is_the_built_in() -> None:
    models = [nn.Linear(9, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, name in zip(models, ("adam", "torch.optim:Adam"), strict=True):
        optimizer = make_optimizer(Recipe(optimizer=name, lr=0.1), model)
        for step in range(5):
            set_learning_rate(optimizer, 0.1 / (step + 1))
            model.weight.grad, model.bias.grad = torch.full((5, 9), step - 2.0), torch.ones(5)
            optimizer.step()
    torch.testing.assert_close(*(model.state_dict() for model in models))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("user_functions:Counting", r"keeps state that is not in its state_dict\(\)"),
        ("user_functions:Noisy", "draws random numbers"),
        ("user_functions:Clearing", r"step\(\) removes or replaces a parameter's grad"),
        ("user_functions:Odd", "a checkpoint cannot hold its state_dict"),
        ("user_functions:without_the_first", "does not have all parameters"),
        ("user_functions:without_a_rate", r"f\(parameters, lr=0.001\), it fails: TypeError"),
        ("user_functions:Averaging", "its state has the name 'average'"),
        ("user_functions:doubling", "changes the weights before the first step"),
        ("user_functions:nothing", "returns a NoneType, not a torch.optim.Optimizer"),
        (
            "user_functions:scheduled",
            "a scheduler of torch.optim.lr_scheduler is attached to it, but --sched",
        ),
        ("torch.optim:LBFGS", r"step\(\) needs a closure"),
        ("torch.optim:SparseAdam", r"step\(\) fails: RuntimeError: SparseAdam does not support dense"),
        ("torch.optim:Nadam", "has no attribute 'Nadam'"),
    ],
)
def test_an_optimizer_that_cannot_be_used(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=f"--optimizer {name}: .*{problem}"):
        make_optimizer(Recipe(optimizer=name), nn.Linear(3, 2))
