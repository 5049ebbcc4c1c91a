"""Test that the mean of a run's last weights is that computed from the weights of each step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import dmnist, events, train
from torch import Tensor

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.models.build import build, place
from distributed_mnist.optim import weight_average
from distributed_mnist.optim.schedule import make_optimizer
from distributed_mnist.runs.checkpoint import decode, encode, load_weights, snapshot
from distributed_mnist.runs.optimizer_state import load_optimizer

STEPS = 12
LR = 0.02
FLAGS = ("--model", "cnn-small", "--optimizer", "muon", "--batch-size", 40, "--steps", STEPS, "--epochs", 9)
CYCLE = (*FLAGS, "--schedule", "one-cycle", "--lr", LR)
AVERAGED = (*CYCLE, "--final-div", 4, "--average", 0.5)  # the weights after steps 7 to 12


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return decode(checkpoint.read_bytes(), "it")["model"]


@pytest.fixture(scope="module")
def flags(digits: Path) -> tuple[object, ...]:
    return ("--dataset", "idx", "--data", digits)


@pytest.fixture(scope="module")
def whole(
    flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run that has the checkpoint of each step, and its result."""
    out = tmp_path_factory.mktemp("averaged") / "out"
    every = ("--checkpoint-every", 1, "--keep", STEPS, "--eval-every", 5)
    return out, train(*flags, *AVERAGED, *every, nproc=2, out=out)


def test_the_answer_is_the_mean_of_the_last_weights(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path
) -> None:
    """No checkpoint has the weights after the last step. The test computes them again, at the last rate,
    from those of the step before."""
    out, result = whole
    checkpoints = [out / "checkpoints" / f"step_{step:08}.pt" for step in range(7, STEPS + 1)]
    content = decode(checkpoints[-2].read_bytes(), "it")
    alone = Recipe.from_dict(content["recipe"], "it").replace(
        schedule="constant", lr=LR / 4, adam_lr=0.005 / 4, final_div=1000.0, average=0.0
    )
    start = tmp_path / "step_00000011.pt"
    start.write_bytes(encode({**content, "recipe": alone.to_dict()}))
    last = train(
        *(*flags, *FLAGS, "--schedule", "constant", "--lr", LR / 4, "--adam-lr", 0.005 / 4),
        *("--resume", start),
        nproc=1,
        out=tmp_path / "last",
    )
    steps = [weights_of(path) for path in checkpoints[:-1]]
    steps.append(weights_of(Path(last["out"]) / "checkpoints" / checkpoints[-1].name))
    for name, mean in weights_of(checkpoints[-1]).items():
        each = torch.stack([weights[name].double() for weights in steps])
        torch.testing.assert_close(mean.double(), each.mean(0), rtol=1e-5, atol=1e-7)
        assert (mean.double() - each[-1]).abs().max() > 1e-4  # of all that differ, it is the mean
    for path in (checkpoints[-1], out):  # the mean is what was scored, and what the run's folder stands for
        scored = dmnist("evaluate", path, "--device", "cpu", "--json").json()
        same = ("weights_sha256", "test_accuracy", "test_loss")
        assert {name: scored[name] for name in same} == {name: result[name] for name in same}


@pytest.mark.parametrize(("nproc", "step"), [(1, 3), (3, 6), (4, 7), (1, 11)])
def test_resumed_at_another_size(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path, nproc: int, step: int
) -> None:
    out, result = whole
    start = out / "checkpoints" / f"step_{step:08}.pt"
    again = train(*flags, *AVERAGED, "--resume", start, nproc=nproc, out=tmp_path / "out")
    assert [event["step"] for event in events(tmp_path / "out") if event["event"] == "start"] == [step]
    assert again["weights_sha256"] == result["weights_sha256"]
    assert again["test_loss"] == result["test_loss"]


def test_the_mean_of_one_step_is_that_step(flags: tuple[object, ...], tmp_path: Path) -> None:
    one = train(*flags, *CYCLE, "--average", 0.01, nproc=1, out=tmp_path / "one")
    none = train(*flags, *CYCLE, nproc=1, out=tmp_path / "none")
    assert one["weights_sha256"] == none["weights_sha256"]


def test_ddp_averages_too(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path
) -> None:
    """The result is equal up to rounding, so near the mean, which no single step's weights are."""
    out, _ = whole
    train(*flags, *AVERAGED, "--sync", "ddp", nproc=2, out=tmp_path / "ddp")
    mean = weights_of(out / "checkpoints" / f"step_{STEPS:08}.pt")
    for name, found in weights_of(tmp_path / "ddp" / "checkpoints" / f"step_{STEPS:08}.pt").items():
        torch.testing.assert_close(found, mean[name], rtol=0, atol=1e-4)


def test_a_finished_run_is_resumed(whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...]) -> None:
    out, result = whole
    again = train(*flags, *AVERAGED, "--resume", "auto", nproc=2, out=out)
    assert again == result


def test_more_epochs_are_refused(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path
) -> None:
    start = whole[0] / "checkpoints" / "step_00000006.pt"
    words = ("train", *flags, *AVERAGED, "--steps", 20, "--resume", start, "--out", tmp_path / "out")
    ended = dmnist(*words, "--device", "cpu", "--nproc", 1)
    assert ended.code == CheckpointError.exit_code
    assert (
        "--steps 12 there, 20 here; this recipe's learning rate or average of weights depends on the length"
        in ended.stderr
    )


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_a_running_mean(optimizer: Any) -> None:
    model = place(build("cnn", 10, 0), torch.device("cpu"))
    moved = make_optimizer(Recipe(optimizer=optimizer), model)
    seen: list[list[Tensor]] = []
    for before in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        weight_average.update(moved, before)
        seen.append([p.detach().double() for p in model.parameters()])
    weight_average.apply_mean(moved)
    for p, each in zip(model.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(p.detach().double(), torch.stack(each).mean(0), rtol=0, atol=1e-6)
        assert "average" not in moved.state[p]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_the_mean_goes_through_a_checkpoint(optimizer: Any) -> None:
    """The mean is the same if it is saved and restored into another optimizer between any two steps."""
    recipe = Recipe(optimizer=optimizer)
    ends = []
    for cut in (None, 0, 1, 2):
        model = place(build("cnn-small", 10, 0), torch.device("cpu"))
        moved = make_optimizer(recipe, model)
        for before in range(4):
            torch.manual_seed(before)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            moved.step()
            weight_average.update(moved, before)
            if before == cut:
                weights, state = snapshot(model.state_dict()), snapshot(moved.state_dict())
                model = place(build("cnn-small", 10, 1), torch.device("cpu"))
                moved = make_optimizer(recipe, model)
                load_weights(model, weights, "it")
                load_optimizer(moved, state, "it")
                weight_average.require_mean(moved)
        weight_average.apply_mean(moved)
        ends.append(digest(dict(model.state_dict())))
    assert len(set(ends)) == 1


@pytest.mark.parametrize("mean", ["none", "lacking"])
def test_a_checkpoint_without_the_mean(
    whole: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path, mean: str
) -> None:
    content = decode((whole[0] / "checkpoints" / "step_00000009.pt").read_bytes(), "it")
    for state in content["optimizer"]["state"].values():
        del state["average"]
        if mean == "none":
            state["average"] = None
    start = tmp_path / "start.pt"
    start.write_bytes(encode(content))
    words = ("train", *flags, *AVERAGED, "--resume", start, "--out", tmp_path / "out")
    ended = dmnist(*words, "--device", "cpu", "--nproc", 1)
    assert ended.code == CheckpointError.exit_code
    assert ended.stderr.splitlines()[-1].endswith(
        "lacks the running mean of its weights, so it cannot be resumed"
    )


MOVING = (
    *FLAGS,
    "--optimizer",
    "adam",
    "--lr",
    0.003,
    "--steps",
    6,
    "--ema",
    0.8,
    "--clip",
    0.5,
    "--schedule",
    "step",
)


@pytest.fixture(scope="module")
def moving(
    flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run with a moving average, and its result."""
    out = tmp_path_factory.mktemp("moving") / "out"
    every = ("--checkpoint-every", 1, "--keep", 9, "--eval-every", 2)
    return out, train(*flags, *MOVING, *every, nproc=1, out=out)


def test_a_moving_average_is_evaluated_and_kept(moving: tuple[Path, dict[str, Any]]) -> None:
    out, result = moving
    saved = sorted((out / "checkpoints").glob("step_*.pt"))
    contents = [decode(path.read_bytes(), "it") for path in saved]
    assert [content["step"] for content in contents] == [1, 2, 3, 4, 5, 6]
    for i, name in enumerate(contents[0]["model"]):
        weights = [content["optimizer"]["state"][i]["weights_ema"].double() for content in contents]
        average = weights[0]
        for content, now in zip(contents[1:], weights[1:], strict=True):
            average = average * 0.8 + now * 0.2
            found = content["model"][name].double()
            torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
            assert (found - now).abs().max() > 1e-6
    assert digest(contents[-1]["model"]) == result["weights_sha256"]
    best = max(
        (event for event in events(out) if event["event"] == "evaluation"), key=lambda e: e["test_accuracy"]
    )
    scored = dmnist("evaluate", out, "--device", "cpu", "--json").json()
    assert scored["test_loss"] == best["test_loss"]


@pytest.mark.parametrize(("nproc", "step"), [(3, 0), (2, 3)])
def test_a_moving_average_at_another_size_and_resumed(
    moving: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path, nproc: int, step: int
) -> None:
    out, result = moving
    resume = ("--resume", out / "checkpoints" / f"step_{step:08}.pt") if step else ()
    again = train(*flags, *MOVING, *resume, nproc=nproc, out=tmp_path / "out")
    assert again["weights_sha256"] == result["weights_sha256"]
    assert again["test_loss"] == result["test_loss"]


def test_a_longer_run_continues_the_moving_average(
    moving: tuple[Path, dict[str, Any]], flags: tuple[object, ...], tmp_path: Path
) -> None:
    """The last checkpoint has the weights from which training continues."""
    start = moving[0] / "checkpoints" / "step_00000006.pt"
    more = (*flags, *MOVING, "--steps", 8)
    continued = train(*more, "--resume", start, nproc=1, out=tmp_path / "continued")
    assert continued["weights_sha256"] == train(*more, nproc=2, out=tmp_path / "whole")["weights_sha256"]
