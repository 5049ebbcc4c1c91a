"""The mean of a run's last weights: what one works out from those of each step, however it was run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import events, train
from torch import Tensor

from distributed_mnist import averaging
from distributed_mnist.checkpoint import decode, encode
from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.models import build, place
from distributed_mnist.optim import make_optimizer

STEPS = 12
FLAGS = (
    "--model",
    "cnn-small",
    "--batch-size",
    40,
    "--steps",
    STEPS,
    "--epochs",
    9,
    "--schedule",
    "one-cycle",
)
AVERAGED = (*FLAGS, "--final-div", 3, "--average", 0.5)  # the weights after steps 7 to 12


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return decode(checkpoint.read_bytes(), "it")["model"]


@pytest.fixture(scope="module")
def flags(digits: Path) -> tuple[object, ...]:
    return ("--dataset", "idx", "--data", digits)


@pytest.fixture(scope="module")
def whole(
    flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run with the checkpoint of each step, and its result."""
    out = tmp_path_factory.mktemp("averaged") / "out"
    every = ("--checkpoint-every", 1, "--keep", STEPS, "--eval-every", 5)
    return out, train(*flags, *AVERAGED, *every, nproc=2, out=out)


def test_the_answer_is_the_mean_of_the_last_weights(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path
) -> None:
    """The weights after the last step itself come from a run of the same rates whose last weights alone are
    averaged."""
    out, _ = whole
    steps = [weights_of(out / "checkpoints" / f"step_{step:08}.pt") for step in range(7, STEPS)]
    resumed = tmp_path / "last"
    content = decode((out / "checkpoints" / "step_00000011.pt").read_bytes(), "it")
    recipe = Recipe.from_dict(content["recipe"], "it").replace(schedule="constant", average=0.0)
    content["recipe"] = recipe.replace(lr=recipe.lr / 3).to_dict()
    start = tmp_path / "step_00000011.pt"
    start.write_bytes(encode(content))
    plain = (*FLAGS[:-1], "constant", "--lr", recipe.lr / 3, "--final-div", 3)
    train(*flags, *plain, "--resume", start, nproc=1, out=resumed)
    steps.append(weights_of(resumed / "checkpoints" / f"step_{STEPS:08}.pt"))
    found = weights_of(out / "checkpoints" / f"step_{STEPS:08}.pt")
    for name, mean in found.items():
        each = torch.stack([weights[name].double() for weights in steps])
        torch.testing.assert_close(mean.double(), each.mean(0), rtol=1e-5, atol=1e-7)
        assert (mean.double() - each[-1]).abs().max() > 1e-4  # of all that differ, it is the mean


@pytest.mark.parametrize(("nproc", "step"), [(1, 3), (3, 6), (4, 7), (1, 11)])
def test_gone_on_with_at_another_size(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path, nproc: int, step: int
) -> None:
    out, result = whole
    start = out / "checkpoints" / f"step_{step:08}.pt"
    again = train(*flags, *AVERAGED, "--resume", start, nproc=nproc, out=tmp_path / "out")
    assert [event["step"] for event in events(tmp_path / "out") if event["event"] == "start"] == [step]
    assert again["weights_sha256"] == result["weights_sha256"]
    assert again["test_loss"] == result["test_loss"]


def test_the_mean_of_one_step_is_that_step(flags: tuple[object, ...], tmp_path: Path) -> None:
    one = train(*flags, *FLAGS, "--average", 0.01, nproc=1, out=tmp_path / "one")
    none = train(*flags, *FLAGS, nproc=1, out=tmp_path / "none")
    assert one["weights_sha256"] == none["weights_sha256"]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_a_running_mean(optimizer: Any) -> None:
    model = place(build("cnn", 10, 0), torch.device("cpu"))
    moved = make_optimizer(Recipe(optimizer=optimizer), model)
    seen: list[list[Tensor]] = []
    for before in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        averaging.join(moved, before)
        seen.append([p.detach().double() for p in model.parameters()])
    averaging.adopt(moved)
    for p, each in zip(model.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(p.detach().double(), torch.stack(each).mean(0), rtol=0, atol=1e-6)
        assert "average" not in moved.state[p]


def test_a_checkpoint_without_the_mean() -> None:
    moved = make_optimizer(Recipe(), build("linear", 10, 0))
    with pytest.raises(CheckpointError, match=r"lacks the mean of its weights$"):
        averaging.join(moved, 1)
