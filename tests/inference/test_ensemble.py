"""`--ensemble N`: each network equals a run with its seed alone, and the vote is their mean probability."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import run_folders
import torch
from ranks import DMNIST, WarmProgram, events, last_step, train
from torch import nn
from warm import here

from distributed_mnist.data import idx
from distributed_mnist.errors import CheckpointError
from distributed_mnist.inference.trained import find_checkpoint
from distributed_mnist.inference.vote import Vote
from distributed_mnist.models.build import forward
from distributed_mnist.runs.layout import resume_flags

FLAGS = ("--recipe", "fast", "--model", "mlp", "--steps", 4, "--batch-size", 100, "--seed", 3)


@pytest.fixture(scope="module")
def data(digits: Path) -> tuple[object, ...]:
    return ("--dataset", "idx", "--data", digits)


@pytest.fixture(scope="module")
def two(data: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished ensemble of two, and what `--json` printed. Tests change a copy of it."""
    out = tmp_path_factory.mktemp("two") / "out"
    output = here("train", "--device", "cpu", *data, *FLAGS, "--ensemble", 2, "--out", out, "--json").json()
    return out, output


@pytest.fixture(scope="module")
def three(
    data: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished ensemble of three, trained in one process, and its result."""
    out = tmp_path_factory.mktemp("three") / "out"
    return out, train(*data, *FLAGS, "--ensemble", 3, nproc=1, out=out)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_a_vote_is_the_mean_of_the_probabilities() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 3) for _ in range(4)]
    inputs = torch.randn(7, 5)
    mean = torch.stack([model(inputs).softmax(1) for model in models]).mean(0)
    torch.testing.assert_close(Vote(models)(inputs).exp(), mean)


def test_one_model_alone_gets_its_way() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3), torch.randn(7, 5)
    torch.testing.assert_close(Vote([model])(inputs), model(inputs).log_softmax(1))


def test_logits_of_any_size_are_voted_on() -> None:
    sure, unsure = nn.Linear(1, 2), nn.Linear(1, 2)
    with torch.no_grad():
        for model, logits in ((sure, [500.0, -500.0]), (unsure, [-1.0, 1.0])):
            model.weight.zero_()
            model.bias.copy_(torch.tensor(logits))
    vote = Vote([sure, unsure])(torch.ones(1, 1))
    assert vote.isfinite().all()
    assert vote.argmax() == 0


def test_a_vote_of_exact_networks() -> None:
    torch.manual_seed(0)
    vote, inputs = Vote([nn.Linear(5, 3), nn.Linear(5, 3)]), torch.randn(7, 5)
    with torch.no_grad():
        logits = forward(vote, inputs, "exact")
        alone = torch.cat([forward(vote, row, "exact") for row in inputs.split(1)])
    torch.testing.assert_close(logits, vote(inputs), atol=1e-3, rtol=1e-3)
    assert torch.equal(logits, alone)


def test_members_are_what_their_seeds_give_at_any_size(
    three: tuple[Path, dict[str, Any]], tmp_path: Path, data: tuple[object, ...]
) -> None:
    votes = [three[1], train(*data, *FLAGS, "--ensemble", 3, nproc=3, out=tmp_path / "of-3")]
    assert [member["seed"] for member in votes[0]["members"]] == [3, 4, 5]
    alone = train(*data, *FLAGS, "--seed", 5, nproc=2, out=tmp_path / "alone")
    assert votes[0]["members"][2]["weights_sha256"] == alone["weights_sha256"]
    assert votes[0]["members"][2]["test_accuracy"] == alone["test_accuracy"]
    assert len({member["weights_sha256"] for member in votes[0]["members"]}) == 3
    same = ("weights_sha256", "test_accuracy", "test_loss", "confusion", "data_sha256")
    assert {name: votes[0][name] for name in same} == {name: votes[1][name] for name in same}
    confusion = torch.tensor(votes[0]["confusion"])
    assert int(confusion.sum()) == votes[0]["test_images"] == 300
    assert int(confusion.trace()) / 300 == votes[0]["test_accuracy"]
    # Three that disagree have a smaller loss together than on average (Jensen's inequality).
    results = [json.loads((three[0] / f"seed-{seed}/result.json").read_text()) for seed in (3, 4, 5)]
    assert votes[0]["test_loss"] < sum(result["test_loss"] for result in results) / 3


def test_it_resumes_where_it_stopped(tmp_path: Path, data: tuple[object, ...]) -> None:
    """One network is finished and another stopped half-way. Only the missing steps are trained."""
    flags = (*data, *FLAGS, "--schedule", "constant")
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(*flags, nproc=1, out=out / "seed-3")
    train(*flags, "--seed", 4, "--steps", 2, nproc=1, out=out / "seed-4")
    again = train(*flags, "--ensemble", 2, "--resume", "auto", nproc=2, out=out)
    steps = [[e["step"] for e in events(out / f"seed-{seed}") if e["event"] == "start"] for seed in (3, 4)]
    assert steps == [[0, 4], [0, 2]]
    assert again["weights_sha256"] == train(*flags, "--ensemble", 2, nproc=1, out=whole)["weights_sha256"]


def test_a_stop_prints_how_to_resume(tmp_path: Path, data: tuple[object, ...]) -> None:
    out = tmp_path / "out"
    command = (
        *DMNIST,
        "train",
        *data,
        *FLAGS,
        "--steps",
        0,
        "--epochs",
        100_000,
        "--ensemble",
        2,
        "--out",
        out,
    )
    with WarmProgram([*command, "--nproc", 2]) as program:
        program.wait_for(lambda: last_step(out / "seed-3") > 5, "a step")
        program.signal(signal.SIGTERM)
        ended = program.finish()
    assert ended.code == 75, ended
    assert f"--resume auto --out {out} --ensemble 2\n" in ended.stderr
    assert not (out / "seed-4").exists()


def test_json_is_one_object(two: tuple[Path, dict[str, Any]]) -> None:
    out, output = two
    assert output == json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ensemble", "0"], ["--ensemble", "at least 1"]),
        (["--ensemble", "2", "--resume", "a.pt"], ["--ensemble", "--resume auto"]),
        (["--ensemble", "2", "--seed", str(2**63 - 1)], ["--seed"]),
    ],
)
def test_what_is_refused(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    ended = here("train", "--dataset", "generated", *flags, "--out", tmp_path / "out")
    assert ended.code == 2, ended
    assert all(word in ended.stderr for word in words), ended
    assert not (tmp_path / "out").exists()


def test_it_starts_its_own_processes(tmp_path: Path) -> None:
    of_torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = here("train", "--ensemble", 2, "--out", tmp_path / "out", **of_torchrun, **address)
    assert ended.code == 2, ended
    assert "--ensemble starts its own processes" in ended.stderr


def test_the_vote_is_scored_predicts_and_is_exported(
    digits: Path, two: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = copied(two[0], tmp_path), two[1]
    evaluated = here("evaluate", out, "--device", "cpu", "--json").json()
    same = ("test_accuracy", "test_loss", "weights_sha256", "data_sha256", "confusion")
    assert {name: evaluated[name] for name in same} == {name: result[name] for name in same}
    images = next(digits.glob("t10k-images*"))
    seen = here("predict", out, images, "--device", "cpu", "--json").json()
    labels = idx.read(next(digits.glob("t10k-labels*")))
    right = sum(one["label"] == label for one, label in zip(seen["images"], labels, strict=True))
    assert right / len(labels) == result["test_accuracy"]
    assert seen["weights_sha256"] == result["weights_sha256"]
    assert (
        here("export", out, "--format", "torch", "--json").json()["files"][0]["path"] == f"{out}/model.pt2"
    )
    refused = here("export", out, "--format", "safetensors")
    assert (refused.code, refused.stderr.count("holds one network")) == (2, 1)


def test_only_who_voted_votes(
    three: tuple[Path, dict[str, Any]], tmp_path: Path, data: tuple[object, ...]
) -> None:
    out = copied(three[0], tmp_path)
    two = train(*data, *FLAGS, "--ensemble", 2, "--resume", "auto", nproc=1, out=out)
    evaluated = here("evaluate", out, "--device", "cpu", "--json").json()
    assert evaluated["weights_sha256"] == two["weights_sha256"]
    assert evaluated["test_loss"] == two["test_loss"]
    other, one = (out / f"seed-{seed}" / "checkpoints" / "step_00000004.pt" for seed in (5, 3))
    one.write_bytes(other.read_bytes())
    ended = here("evaluate", out)
    assert ended.code == 4
    assert f"has different weights from when {out} was evaluated" in ended.stderr


def test_one_network_is_not_trained_over_an_ensemble(
    two: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = copied(two[0], tmp_path)
    ended = here("train", "--resume", "auto", "--out", out)
    assert (ended.code, ended.stderr) == (2, f"dmnist: {out} is an ensemble: add --ensemble 2\n")
    again = train("--resume", "auto", "--ensemble", 2, nproc=1, out=out)
    assert again["weights_sha256"] == two[1]["weights_sha256"]
    assert resume_flags(out / "seed-3") == f"--resume auto --out {out} --ensemble N"
    assert resume_flags(out) == f"--resume auto --out {out}"


def test_an_unfinished_ensemble_has_no_vote(two: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = copied(two[0], tmp_path)
    (out / "result.json").unlink()
    ended = here("evaluate", out)
    assert ended.code == 4, ended
    assert f"unfinished ensemble: name one of its networks, such as {out / 'seed-3'}" in ended.stderr
    assert here("evaluate", out / "seed-3").code == 0


@pytest.mark.parametrize("damaged", ["result.json", "seed-3/result.json"])
def test_damaged_results_are_named(damaged: str, tmp_path: Path) -> None:
    """A wrong number of steps or another member must not be believed."""
    (tmp_path / "seed-3").mkdir()
    members = [{"seed": 3, "weights_sha256": "a" * 64}]
    (tmp_path / "result.json").write_text(json.dumps({"members": members}))
    (tmp_path / "seed-3" / "result.json").write_text(json.dumps(run_folders.result()))
    with pytest.raises(CheckpointError, match=r"step_00000040\.pt: no such file"):
        find_checkpoint(tmp_path)
    path = tmp_path / damaged
    path.write_text(path.read_text().replace("a" * 64, "a" * 63).replace('"seed": 3', '"seed": -3'))
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{path} is damaged (")


def test_evaluate_of_a_run_that_was_never_scored(
    two: tuple[Path, dict[str, Any]], tmp_path: Path, data: tuple[object, ...]
) -> None:
    out = copied(two[0] / "seed-3", tmp_path)
    (out / "checkpoints/best.pt").unlink()
    ended = here("evaluate", out, *data)
    assert ended.stdout.startswith(f"{out / 'checkpoints/step_00000004.pt'}: test accuracy "), ended
