"""Test that models without an exact form are refused in one line, and that others train."""

import json
from pathlib import Path

import exact_models
import pytest
import torch
import warm
from torch import nn

from distributed_mnist.errors import UsageError
from distributed_mnist.exact.products.interface import MOST_TERMS
from distributed_mnist.gradients.exact.trial import require_exact_form


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            exact_models.batch_norm(10),
            r"batch_norm has no exact form: use GroupNorm or LayerNorm \(layer 1\)",
        ),
        (exact_models.in_evaluation(10), r"softsign has no exact form \(layer last\)"),
        (exact_models.one_output(10), r"it fails: ValueError: .* \(layer 1\)"),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 784)), nn.Conv1d(1, 2, 784)), "conv1d"),
    ],
)
def test_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--model my:net: with --precision exact, .*{message}"):
        require_exact_form(model, "my:net", torch.device("cpu"), (1, 28, 28), 1)


def test_a_batch_whose_sums_may_round_is_refused() -> None:
    """The convolution has 26 * 26 positions for each image."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))
    most = MOST_TERMS // 26**2
    require_exact_form(model, "my:net", torch.device("cpu"), (1, 28, 28), most)
    with pytest.raises(UsageError, match=rf"^--batch-size {most + 1}: .* exact up to --batch-size {most}$"):
        require_exact_form(model, "my:net", torch.device("cpu"), (1, 28, 28), most + 1)


@pytest.mark.parametrize(
    ("place", "register", "named"),
    [
        ("1.weight", "register_hook", r"its parameter 1\.weight"),
        ("1", "register_full_backward_hook", "its layer 1"),
        ("1", "register_full_backward_pre_hook", "its layer 1"),
        ("", "register_full_backward_hook", "it"),
    ],
)
def test_a_hook_for_gradients_is_refused(place: str, register: str, named: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    owner = {**dict(model.named_modules()), **dict(model.named_parameters())}[place]
    getattr(owner, register)(lambda *_: None)
    with pytest.raises(UsageError, match=f"^--model my:net: {named} has a hook for gradients"):
        require_exact_form(model, "my:net", torch.device("cpu"), (1, 28, 28), 1)


@pytest.mark.parametrize("name", ["resnet", "vit", "separable"])
def test_any_number_of_processes_trains_the_same(name: str, digits: Path, tmp_path: Path) -> None:
    hashes = set()
    for nproc in (1, 3):
        folder = tmp_path / str(nproc)
        done = warm.here(
            "train", "--model", f"exact_models:{name}", "--precision", "exact", "--nproc", nproc, "--steps",
            2, "--batch-size", 20, "--dataset", "idx", "--data", digits, "--out", folder,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        hashes.add(json.loads((folder / "result.json").read_text())["weights_sha256"])
    assert len(hashes) == 1
