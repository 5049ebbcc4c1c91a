"""Test a validation split: it chooses the weights and the end of the run, in the same way at every size."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import events, train

import distributed_mnist as library
from distributed_mnist.common.digest import digest
from distributed_mnist.common.placement import ALONE
from distributed_mnist.config import Recipe
from distributed_mnist.data.broadcast import broadcast_dataset
from distributed_mnist.data.datasets import load as load_dataset
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import CheckpointError
from distributed_mnist.inference.trained import find_checkpoint
from distributed_mnist.reporting import watch
from distributed_mnist.reporting.html_report import render
from distributed_mnist.runs.checkpoint import decode, encode
from distributed_mnist.runs.record import read
from distributed_mnist.runs.timeline import timeline
from distributed_mnist.training.batches import Batches

COUNT, EVERY, PATIENCE = 120, 5, 2
SETTINGS: dict[str, Any] = {"validation": COUNT, "patience": PATIENCE, "eval_every": EVERY, "lr": 0.02}
SETTINGS |= {"batch_size": 96, "epochs": 12, "checkpoint_every": 1, "keep": 1000}
FLAGS = ["--recipe", "classic"] + [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
PROMISED = ("steps", "best_step", "validation_accuracy", "test_accuracy", "test_loss", "weights_sha256")
PROMISED += ("samples_sha256", "data_sha256")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> library.Result:
    """A run in one process that stops early, and keeps the checkpoint of each step."""
    out = tmp_path_factory.mktemp("validation") / "out"
    return library.train("classic", dataset=digits, out=out, **SETTINGS)


def promised(out: Path) -> dict[str, Any]:
    result = json.loads((out / "result.json").read_text())
    return {name: result[name] for name in PROMISED}


def checkpoint(run: library.Result, step: int) -> Path:
    return run.out / "checkpoints" / f"step_{step:08}.pt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return decode(path.read_bytes(), "it")["model"]


def test_it_stops_early_and_the_result_is_the_best(run: library.Result, digits: Path) -> None:
    scored = [event for event in events(run.out) if event["event"] == "evaluation"]
    accuracies = [event["validation_accuracy"] for event in scored]
    assert [event["step"] for event in scored] == list(range(EVERY, run.steps + 1, EVERY))
    assert not any(name.startswith("test_") for event in scored for name in event)
    assert {event["validation_images"] for event in scored} == {COUNT}
    best = accuracies.index(max(accuracies))
    assert (run.best_step, run.validation_accuracy) == (scored[best]["step"], max(accuracies))
    assert len(accuracies) - 1 - best == PATIENCE
    assert run.steps < 12 * 11
    # The test recomputes the accuracies from the files.
    data = load_dataset("idx", digits)
    model = weights(checkpoint(run, scored[best]["step"]))
    assert correct(model, data, data.train_images[-COUNT:], data.train_labels[-COUNT:]) == max(accuracies)
    assert correct(model, data, data.test_images, data.test_labels) == run.accuracy


def correct(model: dict[str, torch.Tensor], data: Any, images: Any, labels: Any) -> float:
    pixels = (images.reshape(-1, 784) / 255 - data.mean) / data.std
    logits = pixels @ model["fc.weight"].numpy().astype(np.float64).T + model["fc.bias"].numpy()
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def test_the_same_at_another_size(run: library.Result, digits: Path, tmp_path: Path) -> None:
    train("--dataset=idx", "--data", digits, *FLAGS, nproc=3, out=tmp_path / "out")
    assert promised(tmp_path / "out") == promised(run.out)


@pytest.mark.parametrize("back", [PATIENCE * EVERY + 1, 1, 0])
def test_the_same_after_a_resume(run: library.Result, digits: Path, tmp_path: Path, back: int) -> None:
    """Before the best evaluation, in the last interval, and when the run has already stopped."""
    start = checkpoint(run, run.steps - back)
    library.train("classic", dataset=digits, out=tmp_path, resume=start, **SETTINGS)
    assert promised(tmp_path) == promised(run.out)
    steps = [event["step"] for event in events(tmp_path) if event["event"] == "steps"]
    assert steps[-1:] == ([run.steps] if back else [])


def test_a_run_stands_for_its_best_weights(run: library.Result, digits: Path) -> None:
    assert run.best_step is not None and run.best_step < run.steps
    for trained in (library.load(run.out), library.load(run.out / "checkpoints"), run.load()):
        assert trained.weights_sha256 == run.weights_sha256
        assert trained.title == f"{checkpoint(run, run.steps)}, best weights (step {run.best_step})"
    for named in (checkpoint(run, run.best_step), run.out / "checkpoints" / "best.pt"):
        assert library.load(named).weights_sha256 == run.weights_sha256
        assert library.load(named).title == str(named)
    assert library.load(checkpoint(run, run.steps)).weights_sha256 != run.weights_sha256
    assert library.evaluate(run.out, digits).accuracy == run.accuracy


def test_an_ensemble_votes_with_the_best_weights(run: library.Result, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}").symlink_to(run.out)
    members = [{"seed": seed, "weights_sha256": run.weights_sha256} for seed in (0, 1)]
    (tmp_path / "result.json").write_text(json.dumps({"members": members}))
    trained = library.load(tmp_path)  # raises an error if the digests differ
    assert (trained.title, trained.weights_sha256) == (str(tmp_path), digest([run.weights_sha256] * 2))


def test_without_a_split_a_run_stands_for_its_last_weights(digits: Path, tmp_path: Path) -> None:
    """Its best.pt is by the accuracy on the test images."""
    settings = {**SETTINGS, "validation": 0, "patience": 0, "steps": 25, "eval_every": 1, "keep": 2}
    last = library.train("classic", dataset=digits, out=tmp_path / "out", **settings)
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    assert library.load(tmp_path / "out").weights_sha256 == last.weights_sha256
    assert library.load(best).weights_sha256 != last.weights_sha256
    assert library.evaluate(best, digits).accuracy > library.evaluate(tmp_path / "out", digits).accuracy
    assert (last.validation_accuracy, last.best_step) == (None, None)
    for path in (tmp_path / "out" / "checkpoints").glob("step_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"its last checkpoint: name another one, such as {best}$"):
        library.load(tmp_path / "out")


def test_the_original_scripts_last_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint_9", "checkpoint_10_3", "checkpoint_10", "checkpoint_11_5", "model_best"):
        (tmp_path / f"{name}.pth.tar").write_bytes(b"")
    assert find_checkpoint(tmp_path).path == str(tmp_path / "checkpoint_11_5.pth.tar")
    (tmp_path / "checkpoint_11_5.pth.tar").unlink()
    assert find_checkpoint(tmp_path).path == str(tmp_path / "checkpoint_10.pth.tar")


def test_what_is_trained_on_is_not_validated_on(digits: Path) -> None:
    """The ids of the training samples are those without the last ones."""
    world = World(ALONE, torch.device("cpu"), "none")
    whole = broadcast_dataset(world, lambda: load_dataset("idx", digits))
    recipe = Recipe(validation=0.1, batch_size=96)
    data = whole.with_validation(recipe)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (990, 110)
    batches = Batches(data.train, recipe, data.mean, data.std)
    ids = [batches.take(step, range(8)).ids for step in range(batches.steps_per_epoch)]
    assert sorted(np.concatenate(ids).tolist()) == list(range(990))
    assert torch.equal(data.validation.images, whole.train.images[990:])
    assert torch.equal(data.validation.labels, whole.train.labels[990:])
    assert data.sha256 == whole.sha256


def test_checkpoints_of_earlier_versions_are_read(
    run: library.Result, digits: Path, tmp_path: Path
) -> None:
    """They lack what the choice of weights needs, and have a recipe without it."""
    start = tmp_path / "start.pt"
    settings = {**SETTINGS, "validation": 0, "patience": 0, "steps": 6}
    whole = library.train("classic", dataset=digits, out=tmp_path / "out", **settings)
    content = decode((tmp_path / "out" / "checkpoints" / "step_00000004.pt").read_bytes(), "it")
    for name in ("best_step", "evaluations_since_best", "best_weights"):
        del content[name]
    for name in ("validation", "patience", "eval_every"):
        del content["recipe"][name]
    start.write_bytes(encode(content))
    again = library.train("classic", dataset=digits, out=tmp_path / "again", resume=start, **settings)
    assert again.weights_sha256 == whole.weights_sha256
    assert library.load(start).best_step is None


@pytest.mark.parametrize("wrong", [{}, {"fc.weight": torch.zeros(2)}, {3: 4}])
def test_damaged_best_weights_are_refused(
    run: library.Result, digits: Path, tmp_path: Path, wrong: dict[Any, Any]
) -> None:
    content = decode(checkpoint(run, run.steps).read_bytes(), "it")
    start = tmp_path / "start.pt"
    start.write_bytes(encode({**content, "best_weights": wrong}))
    with pytest.raises(CheckpointError, match="is from a different model"):
        library.train("classic", dataset=digits, out=tmp_path / "out", resume=start, **SETTINGS)


def test_another_length_or_other_evaluations_are_another_run(
    run: library.Result, digits: Path, tmp_path: Path
) -> None:
    """The evaluations choose the weights, and there is one after the last step."""
    start = checkpoint(run, 4)
    for name, here in (("epochs", 13), ("eval_every", 6), ("patience", 3)):
        with pytest.raises(CheckpointError, match=f"different recipe: {name}=.* there, {here} here"):
            settings = {**SETTINGS, name: here}
            library.train("classic", dataset=digits, out=tmp_path / name, resume=start, **settings)


def test_the_record_says_which_images(run: library.Result) -> None:
    record = read(run.out)
    assert record.test is not None and record.test["test_accuracy"] == run.accuracy
    assert record.state == "finished"
    texts = [line.text for line in timeline(record)]
    assert f"step 5: validation accuracy {record.evaluations[0]['validation_accuracy']:.2%}" in texts[1]
    assert f"result, from step {run.best_step}: test accuracy {run.accuracy:.2%}" in texts
    stopped = f"stopped early, after step {run.steps} of 132: {PATIENCE} evaluations have not improved on"
    assert any(text.startswith(stopped) for text in texts)
    state = watch.state(run.out)
    assert state["test_accuracy"] == run.accuracy
    assert state["validation_accuracy"] == record.evaluations[-1]["validation_accuracy"]
    page = render([record])
    assert f"<b>{run.accuracy:.2%}</b><span>of 300 test images".replace("%<", " %<") in page
    best = f"<b>{run.validation_accuracy:.2%}</b><span>best validation accuracy, step {run.best_step}"
    assert best.replace("%<", " %<") in page
    wrong = json.loads((run.out / "mistakes.json").read_text())
    assert (wrong["step"], wrong["images"]) == (run.best_step, "test")
    assert len(wrong["mistakes"]) == round(300 * (1 - run.accuracy))
    assert page.count('title="test image ') == len(wrong["mistakes"])


def test_the_record_of_a_run_in_progress_is_of_the_validation_images(
    run: library.Result, tmp_path: Path
) -> None:
    lines = (run.out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = lines[: next(i for i, line in enumerate(lines) if '"event": "test"' in line)]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    record = read(tmp_path)
    assert record.test is None
    assert f"of {COUNT} validation images" in render([record])
    row = render([record, read(run.out)]).partition("<tr><th>test accuracy</th>")[2].partition("</tr>")[0]
    assert re.findall(r"\d+\.\d+", row) == [f"{100 * run.accuracy:.2f}"]  # there is none yet of the first
    assert watch.state(tmp_path)["test_accuracy"] is None
    assert watch.state(tmp_path)["validation_accuracy"] == record.evaluations[-1]["validation_accuracy"]
