"""Test that a run starts from given weights in any kind of file, and resumes only with the same ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import train
from safetensors.torch import save_file

from distributed_mnist.common.digest import digest
from distributed_mnist.errors import CheckpointError
from distributed_mnist.models.build import build
from distributed_mnist.runs.checkpoint import decode, encode
from distributed_mnist.runs.initial_weights import load_initial_weights, read_initial_weights


def initial(path: Path) -> dict[str, Any]:
    """The weights of a linear model that starts from those in `path`."""
    model = build("linear", 10, 0)
    load_initial_weights(model, *read_initial_weights(path))
    return dict(model.state_dict())


FLAGS = ("--recipe", "classic", "--steps", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def first(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run, and its result."""
    out = tmp_path_factory.mktemp("first") / "out"
    return out, train("--dataset", "idx", "--data", digits, *FLAGS, "--seed", 5, nproc=1, out=out)


def test_any_file_with_the_weights(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = first
    checkpoint = out / "checkpoints" / "step_00000004.pt"
    weights = decode(checkpoint.read_bytes(), "it")["model"]
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "bare.safetensors")
    for path in (out, checkpoint, tmp_path / "bare.pt", tmp_path / "bare.safetensors"):
        assert digest(initial(path)) == result["weights_sha256"]


def test_a_run_with_a_validation_split_stands_for_its_best_weights(
    first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    content = decode((first[0] / "checkpoints" / "step_00000004.pt").read_bytes(), "it")
    best = {name: torch.full_like(value, 0.5) for name, value in content["model"].items()}
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints" / "step_00000004.pt"
    last.write_bytes(encode({**content, "best_weights": best}))
    for path, expected in ((tmp_path, best), (last, content["model"])):
        assert digest(initial(path)) == digest(expected)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "classes.pt",
            {"fc.weight": torch.ones(47, 784), "fc.bias": torch.ones(47)},
            r"is \(47, 784\), not \(10",
        ),
        ("names.pt", {"weight": torch.ones(10, 784)}, "only one of the two has fc.bias, fc.weight, weight"),
        (
            "half.pt",
            {"fc.weight": torch.ones(10, 784).half(), "fc.bias": torch.ones(10)},
            "is torch.float16",
        ),
        (
            "nan.pt",
            {"fc.weight": torch.full((10, 784), torch.nan), "fc.bias": torch.ones(10)},
            "its fc.weight has values that are not finite",
        ),
        ("empty.pt", {}, "is not a checkpoint of dmnist"),
        ("list.pt", [1], "it holds a list"),
    ],
)
def test_a_file_with_other_weights(tmp_path: Path, name: str, content: Any, problem: str) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"--init-from .*{name}.*{problem}"):
        load_initial_weights(build("linear", 10, 0), *read_initial_weights(tmp_path / name))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"--init-from .*: the folder has no checkpoint of a run in it"
    ):
        read_initial_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"^--init-from .*/none.pt: no such file"):
        read_initial_weights(tmp_path / "none.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        load_initial_weights(
            build("linear", 10, 0), *read_initial_weights(tmp_path / "damaged.safetensors")
        )


def test_any_size_and_resumed(first: tuple[Path, dict[str, Any]], digits: Path, tmp_path: Path) -> None:
    data, start = ("--dataset", "idx", "--data", digits), ("--init-from", first[0])
    words = (*data, *FLAGS, "--checkpoint-every", 2)
    one = train(*words, *start, nproc=1, out=tmp_path / "one")
    three = train(*words, *start, nproc=3, out=tmp_path / "three")
    assert one["weights_sha256"] == three["weights_sha256"]
    middle = tmp_path / "one" / "checkpoints" / "step_00000002.pt"
    resumed = train(*words, *start, "--resume", middle, nproc=2, out=tmp_path / "resumed")
    assert resumed["weights_sha256"] == one["weights_sha256"]
    assert one["test_loss"] < first[1]["test_loss"]
    for path in (tmp_path / "three" / "checkpoints").glob("step_*.pt"):
        if path.name != "step_00000002.pt":
            path.unlink()
    (tmp_path / "three" / "result.json").unlink()
    first[0].rename(tmp_path / "moved")  # a run that goes on does not need the file any more
    again = train("--resume", "auto", nproc=2, out=tmp_path / "three")
    (tmp_path / "moved").rename(first[0])
    assert again["weights_sha256"] == one["weights_sha256"]
