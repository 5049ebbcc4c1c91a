"""The original script's checkpoints, read and written: tested against torch, used as in that script."""

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe, load_recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.models.build import build
from distributed_mnist.optim.schedule import make_optimizer
from distributed_mnist.runs.checkpoint import FORMAT, decode, encode, load_weights
from distributed_mnist.runs.optimizer_state import load_optimizer
from distributed_mnist.runs.original_format import from_original, is_original, to_original

CLASSIC = load_recipe("classic")


class Net(nn.Module):
    """The original's network, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(x.size(0), -1))


class Wrapped(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(images), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def theirs(
    epoch: int = 3, best_acc: float = 0.9213
) -> tuple[Wrapped, torch.optim.Optimizer, dict[str, Any]]:
    """Return the original's model after some training, and the dictionary that it saves."""
    torch.manual_seed(0)
    model = Wrapped(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trained(model, optimizer, range(5))
    checkpoint = {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_acc": best_acc,
        "optimizer": optimizer.state_dict(),
    }
    return model, optimizer, checkpoint


def ours() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Return our model after some training, and its checkpoint after 2 epochs of 7 steps."""
    model = build("linear", 10, seed=0)
    optimizer = make_optimizer(CLASSIC, model)
    trained(model, optimizer, range(14))
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scales": torch.zeros(0),
        "step": 14,
        "best_accuracy": 0.9213,
        "best_step": 0,
        "evaluations_since_best": 0,
        "best_weights": {},
        "samples_sha256": "ab" * 32,
        "totals": {"loss": 0.0, "correct": 0, "images": 0},
        "train_seconds": 1.5,
        "recipe": CLASSIC.to_dict(),
        "dataset": {
            "name": "mnist",
            "class_names": [],
            "image_shape": [1, 28, 28],
            "mean": 0.1,
            "std": 0.3,
            "sha256": "cd",
        },
        "steps_per_epoch": 7,
        "versions": {"torch": "2"},
    }
    return model, optimizer, content


@pytest.mark.parametrize("best_acc", [0.9213, 0])  # 0, a whole number, before anything was the best
def test_the_originals_own_file_is_read(best_acc: float) -> None:
    model, _, checkpoint = theirs(best_acc=best_acc)
    content = decode(saved(checkpoint), "model_best.pth.tar")
    assert (content["epoch"], content["best_accuracy"]) == (3, best_acc)
    assert isinstance(content["best_accuracy"], float)
    assert (content["recipe"], content["dataset"], content["samples_sha256"]) == (None, None, None)
    assert content["step"] == -1
    assert content["model"].keys() == {"fc.weight", "fc.bias"}
    mine = build("linear", 10, seed=5)
    load_weights(mine, content["model"], "model_best.pth.tar")
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(mine(images), model(images))  # its product is written the other way round


@pytest.mark.parametrize("step_is_number", [False, True])
def test_training_continues_from_the_originals_file(step_is_number: bool) -> None:
    """Our Adam continues from its state: equal except for rounding in the fused version. Old torch versions
    counted steps with ints."""
    model, optimizer, checkpoint = theirs()
    if step_is_number:
        checkpoint["optimizer"] = {
            "state": {
                i: {**state, "step": int(state["step"])}
                for i, state in checkpoint["optimizer"]["state"].items()
            },
            "param_groups": [
                {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")}
                for group in checkpoint["optimizer"]["param_groups"]
            ],
        }
    content = decode(saved(checkpoint), "file")
    mine = build("linear", 10, seed=5)
    its = make_optimizer(CLASSIC, mine)
    load_weights(mine, content["model"], "file")
    load_optimizer(its, content["optimizer"], "file")
    trained(model, optimizer, range(5, 9))
    trained(mine, its, range(5, 9))
    for key, value in model.module.state_dict().items():
        assert torch.allclose(mine.state_dict()[key], value, rtol=1e-5, atol=1e-7)
    assert {float(state["step"]) for state in its.state.values()} == {9.0}


def test_our_file_is_read_by_the_original() -> None:
    """The lines that the original resumes with read it, and training continues as if never interrupted."""
    mine, its, content = ours()
    checkpoint = torch.load(io.BytesIO(encode(to_original(content))), weights_only=True)
    assert {"epoch", "state_dict", "best_acc", "optimizer"} <= checkpoint.keys()
    assert checkpoint["epoch"] == 2
    assert checkpoint["best_acc"] == 0.9213
    model = Wrapped(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(mine(images), model(images))  # its product is written the other way round
    trained(mine, its, range(14, 18))
    trained(model, optimizer, range(14, 18))
    for key, value in model.module.state_dict().items():
        assert torch.allclose(mine.state_dict()[key], value, rtol=1e-5, atol=1e-7)
    assert {float(state["step"]) for state in optimizer.state.values()} == {18.0}


def test_round_trip_is_exact() -> None:
    model, its, content = ours()
    after = decode(encode(to_original(content)), "file")
    assert after.pop("epoch") == 2
    assert digest(after["optimizer"]["state"]) == digest(content["optimizer"]["state"])
    tensors = ("model", "optimizer", "scales")
    assert {k: v for k, v in after.items() if k not in tensors} == {
        k: v for k, v in content.items() if k not in tensors
    }
    assert digest(dict(after["model"])) == digest(dict(content["model"]))

    again = build("linear", 10, seed=5)
    restored = make_optimizer(CLASSIC, again)
    load_weights(again, after["model"], "file")
    load_optimizer(restored, after["optimizer"], "file")
    trained(model, its, range(14, 18))
    trained(again, restored, range(14, 18))
    assert digest(dict(again.state_dict())) == digest(dict(model.state_dict()))


def test_writing_the_originals_format_does_not_change_the_content() -> None:
    _, _, content = ours()
    before = digest(content)
    to_original(content)
    assert digest(content) == before


def test_a_changed_file_of_ours_in_the_originals_format_is_refused() -> None:
    _, _, content = ours()
    data = bytearray(encode(to_original(content)))
    weights = content["model"]["fc.weight"].numpy().tobytes()
    data[data.index(weights[:64]) + 2] ^= 1
    with pytest.raises(CheckpointError, match=r"^file is damaged"):
        decode(bytes(data), "file")


def test_formats_are_distinguished() -> None:
    _, _, checkpoint = theirs()
    _, _, content = ours()
    assert is_original(checkpoint)
    assert is_original(to_original(content))
    assert not is_original(content)
    for key in ("epoch", "state_dict", "best_acc", "optimizer"):
        assert not is_original({k: v for k, v in checkpoint.items() if k != key})


@pytest.mark.parametrize("keys", [("module.fc.weight", "module.fc.bias"), ("fc.weight", "fc.bias")])
def test_names_with_and_without_the_wrapper(keys: tuple[str, str]) -> None:
    weights = OrderedDict(zip(keys, (torch.zeros(10, 784), torch.ones(10)), strict=True))
    content = from_original({"epoch": 1, "state_dict": weights, "best_acc": 0.5, "optimizer": {}}, "file")
    assert list(content["model"]) == ["fc.weight", "fc.bias"]
    assert torch.equal(content["model"]["fc.bias"], torch.ones(10))


def test_only_the_wrappers_prefix_is_removed() -> None:
    weights = {"module.module.x": torch.zeros(1), "submodule.y": torch.zeros(1)}
    content = from_original({"epoch": 1, "state_dict": weights, "best_acc": 0.5, "optimizer": {}}, "file")
    assert list(content["model"]) == ["module.x", "submodule.y"]


@pytest.mark.parametrize(
    "wrong",
    [{"epoch": "3"}, {"epoch": None}, {"state_dict": [1]}, {"best_acc": "high"}, {"best_acc": None}],
)
def test_the_originals_keys_with_other_values(wrong: dict[str, Any]) -> None:
    _, _, checkpoint = theirs()
    with pytest.raises(
        CheckpointError, match=r"^file has the original script's keys, but values of the wrong types$"
    ):
        decode(saved({**checkpoint, **wrong}), "file")


def test_the_originals_file_with_another_model() -> None:
    _, _, checkpoint = theirs()
    content = decode(saved(checkpoint), "file")
    with pytest.raises(CheckpointError, match=r"^file is from a different model: "):
        load_weights(build("mlp", 10, seed=0), content["model"], "file")
    with pytest.raises(CheckpointError, match=r"^file: its optimizer state does not fit: "):
        load_optimizer(make_optimizer(Recipe(), build("mlp", 10, seed=0)), content["optimizer"], "file")
