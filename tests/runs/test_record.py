"""Reading a run's folder: steps after restarts, damaged lines, and folders without a run."""

import base64
from pathlib import Path

import numpy as np
import pytest
import run_folders
import torch
from ranks import dmnist, train
from run_folders import evaluation, start, steps
from torch import nn

from distributed_mnist.common.placement import ALONE
from distributed_mnist.data.broadcast import Data
from distributed_mnist.data.split import Split
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError
from distributed_mnist.runs.record import read
from distributed_mnist.training.evaluate import MAX_MISTAKES, evaluate, mistakes


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    lost = [start(0), steps(10, loss=1.0), steps(20, loss=2.0), evaluation(20), steps(30, loss=3.0)]
    again = [start(10), steps(15, 11, loss=4.0), start(15), steps(20, 16, loss=5.0)]
    (tmp_path / "metrics.jsonl").write_text(run_folders.lines(*lost, *again))
    run = read(tmp_path)
    assert [(event["step"], event["loss"]) for event in run.steps] == [(10, 1.0), (15, 4.0), (20, 5.0)]
    assert run.evaluations == []  # of step 20, before it was taken again
    assert [event["step"] for event in run.starts] == [0, 10, 15]
    assert run.config == {}
    assert run.result is run.mistakes is None
    assert run.problems == []


def test_lines_damaged_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(run_folders.lines(start(0), steps(1, 1)) + '{"event": "st')
    record = read(tmp_path)
    assert len(record.events) == 2
    assert record.problems == []  # the run may be writing it now
    with path.open("a") as file:
        file.write('\n[1]\n{"event": "steps"}\n' + run_folders.lines(steps(2, 2)))
    record = read(tmp_path)
    assert [event["step"] for event in record.steps] == [1, 2]
    assert record.problems == [f"{path}: 3 damaged lines skipped"]


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run: it has no metrics\.jsonl"):
        read(tmp_path)
    (tmp_path / "seed-3").mkdir()
    with pytest.raises(UsageError, match=r"an ensemble: name one of its members, such as .*seed-3"):
        read(tmp_path)


def test_a_real_run_at_two_sizes(digits: Path, tmp_path: Path) -> None:
    """Mistakes and confusion matrix are the same at both sizes, and match each other and the accuracy."""
    records = []
    for nproc in (1, 3):
        out = tmp_path / str(nproc)
        options = [
            "--dataset",
            "idx",
            "--data",
            digits,
            "--model",
            "mlp",
            "--epochs",
            "1",
            "--device",
            "cpu",
        ]
        result = train(*options, nproc=nproc, out=out)
        record = read(out)
        assert record.result is not None
        assert record.result["weights_sha256"] == result["weights_sha256"]
        assert record.config["recipe"]["model"] == "mlp"
        for event in record.steps:
            for values in event["ranks"].values():
                assert len(values) == nproc
                assert all(value >= 0 for value in values)
        records.append(record)
    one, three = records
    assert one.mistakes == three.mistakes
    (evaluation,) = one.evaluations
    assert evaluation["confusion"] == three.evaluations[0]["confusion"]
    assert one.mistakes is not None
    found = one.mistakes["mistakes"]
    wrong = round(evaluation["test_images"] * (1 - evaluation["test_accuracy"]))
    assert len(found) == min(wrong, MAX_MISTAKES) > 0
    pairs = [(each["label"], each["predicted"]) for each in found]
    assert all(
        evaluation["confusion"][label][guess] >= pairs.count((label, guess)) for label, guess in pairs
    )


def test_a_full_disk_loses_the_mistakes_but_not_the_run(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "mistakes.json").mkdir(parents=True)  # nothing can be put in its place
    options = ["--dataset", "idx", "--data", digits, "--model", "linear", "--epochs", "2"]
    ended = dmnist("train", *options, "--out", tmp_path / "out", "--nproc", "1", "--device", "cpu")
    assert ended.code == 0
    assert ended.stdout.count("mistakes.json: ") == 1  # once for two evaluations


def test_metrics_that_end_before_the_run_on_a_full_disk(digits: Path, tmp_path: Path) -> None:
    words = ("--dataset", "idx", "--data", digits, "--recipe", "fast", "--steps", 3)
    train(*words, nproc=1, out=tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    assert read(tmp_path).state == "finished"
    (tmp_path / "result.json").unlink()
    assert read(tmp_path).state == "stopped"


def test_the_most_confident_mistakes_first() -> None:
    class Guess(nn.Module):
        """Reads guess and confidence off two pixels."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            pixels = images[:, 0].mul(255).round()
            logits = torch.zeros(len(images), 10)
            logits[torch.arange(len(images)), pixels[:, 0, 0].long()] = pixels[:, 0, 1] / 10
            return logits

    images = np.zeros((5, 28, 28), np.uint8)
    images[:, 0, 0] = [3, 4, 5, 6, 7]
    images[:, 0, 1] = [10, 20, 50, 40, 30]
    split = Split(torch.from_numpy(images), torch.tensor([3, 1, 1, 1, 1], dtype=torch.uint8))
    world = World(ALONE, torch.device("cpu"), "none")
    data = Data(split, split, "test", tuple("0123456789"), 0.0, 1.0, "", "")
    result = evaluate(Guess(), data, world, "fp32")
    found = mistakes(result, split)
    assert [each["index"] for each in found] == [2, 3, 4, 1]
    assert [each["predicted"] for each in found] == [5, 6, 7, 4]
    assert found[0]["confidence"] == pytest.approx(np.exp(5) / (np.exp(5) + 9))
    assert base64.b64decode(found[0]["image"]) == images[2].tobytes()
