"""The Python API: the same results as the command, errors raised in the caller, own models and data."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import user_models
from ranks import REPOSITORY
from torch import nn

from distributed_mnist import Result, evaluate, from_arrays, load, train
from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.data import datasets
from distributed_mnist.errors import (
    CheckpointError,
    DataError,
    OutputError,
    TrainingError,
    UsageError,
    WorkerLost,
)
from distributed_mnist.runs.lock import is_live
from distributed_mnist.training import run as training

STEPS: dict[str, Any] = {"recipe": "fast", "steps": 3, "device": "cpu"}
SHORT: dict[str, Any] = {**STEPS, "model": "mlp"}


@pytest.fixture(scope="module")
def result(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of three steps in this process."""
    return train(**SHORT, dataset=digits, out=tmp_path_factory.mktemp("library") / "run")


def own(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))


def arrays(count: int = 64) -> dict[str, Any]:
    drawn = datasets.load("generated", Path(), train_size=count, test_size=count)
    return {str(role): array for role, array in drawn.arrays().items()}


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, distributed_mnist; print('torch' in sys.modules, 'train' in dir(distributed_mnist))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")


def test_public_names() -> None:
    import distributed_mnist

    for name in distributed_mnist.__all__:
        assert getattr(distributed_mnist, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = distributed_mnist.no_such_thing


@pytest.mark.parametrize("nproc", [1, 2])
def test_same_weights_as_the_command(nproc: int, result: Result, digits: Path, tmp_path: Path) -> None:
    ranks.server()
    here = train(**SHORT, dataset=digits, out=tmp_path / "library", nproc=nproc)
    words = ("--recipe", "fast", "--model", "mlp", "--steps", 3, "--dataset", "idx", "--data", digits)
    there = ranks.train(*words, nproc=nproc, out=tmp_path / "command")
    for name in ("weights_sha256", "samples_sha256", "data_sha256"):
        assert getattr(here, name) == there[name] == getattr(result, name)
    assert (here.accuracy, here.loss, here.steps) == (there["test_accuracy"], there["test_loss"], 3)


def test_says_nothing_unless_asked(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(**SHORT, dataset=digits, out=tmp_path / "quiet")
    train(**SHORT, dataset=digits, out=tmp_path / "quiet-2", nproc=2)
    assert capfd.readouterr() == ("", "")
    train(**SHORT, dataset=digits, out=tmp_path / "loud", verbose=True)
    assert "test accuracy" in capfd.readouterr().out


def test_leaves_torch_as_it_was(digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    ended = train(**SHORT, dataset=digits, out=tmp_path / "run")
    ended.load()
    evaluate(ended, digits)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_threads_take_turns_and_other_threads_draws_change_nothing(digits: Path, tmp_path: Path) -> None:
    settings = {**STEPS, "model": user_models.dropout, "dataset": digits}
    expected = train(**settings, out=tmp_path / "alone").weights_sha256
    stop = threading.Event()

    def draw() -> None:
        while not stop.wait(0.004):
            torch.rand(3)

    background = threading.Thread(target=draw)
    background.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            ended = pool.map(lambda i: train(**settings, out=tmp_path / str(i)).weights_sha256, range(3))
            assert set(ended) == {expected}
    finally:
        stop.set()
        background.join()


def test_the_callers_state_changes_no_weights(result: Result, digits: Path, tmp_path: Path) -> None:
    pixels = datasets.load("idx", digits).test_images
    expected = result.load().logits(pixels)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        torch.device("meta"),
    ):
        torch.set_default_dtype(torch.float64)
        torch.backends.mkldnn.enabled = False
        try:
            ended = train(**SHORT, dataset=digits, out=tmp_path / "run")
            trained = ended.load()
            scored, logits = evaluate(trained, digits), trained.logits(pixels)
            assert not torch.backends.mkldnn.enabled
        finally:
            torch.set_default_dtype(torch.float32)
            torch.backends.mkldnn.enabled = True
    assert (ended.weights_sha256, scored.loss) == (result.weights_sha256, result.loss)
    assert torch.equal(logits, expected)


def test_values_are_shown_in_a_line(result: Result, digits: Path) -> None:
    """As the last line of a notebook's cell."""
    shown = [repr(value) for value in (result, result.load(), datasets.load("idx", digits))]
    assert shown == [
        f"<Result: {result.accuracy:.2%} of the test images, loss {result.loss:.4f}, 3 steps, weights "
        f"{result.weights_sha256[:8]}…, in {result.out}>",
        f"<Trained: mlp for 10 classes of idx, from {result.out}/checkpoints/step_00000003.pt>",
        f"<Dataset: idx, 1,100 + 300 images, 10 classes, {digits}>",
    ]
    scored = evaluate(result, digits)
    assert repr(scored) == f"<Evaluation: {result.accuracy:.2%} of 300 images, loss {result.loss:.4f}>"
    recipe = result.load().recipe
    assert repr(recipe).startswith("Recipe(model='mlp', epochs=")
    assert eval(repr(recipe), {"Recipe": Recipe}) == recipe
    assert repr(Recipe()) == "Recipe()"


def test_the_trained_network(result: Result, digits: Path) -> None:
    trained = result.load()
    assert digest(dict(trained.network.state_dict())) == result.weights_sha256
    assert result.model is result.model
    data = datasets.load("idx", digits)
    scored = evaluate(result, digits)
    predicted = trained.predict(torch.from_numpy(data.test_images))
    assert torch.equal(predicted, scored.predicted)
    chances = trained.probabilities(torch.from_numpy(data.test_images))
    assert torch.allclose(chances.sum(1), torch.ones(len(chances)))
    assert torch.equal(chances.argmax(1), predicted)


def test_whatever_is_evaluated_scores_the_same(result: Result, digits: Path) -> None:
    data = datasets.load("idx", digits)
    for what in (result, result.out, str(result.out), result.load(), load(result.out)):
        scored = evaluate(what, data)
        assert (scored.accuracy, scored.loss) == (result.accuracy, result.loss)
    bare = evaluate(result.model, data)  # in fp32, where the run has bf16
    assert bare.loss == pytest.approx(result.loss, rel=1e-2)
    assert evaluate(result, data=digits).loss == result.loss  # the data set it was trained on, by name


def test_scored_on_what_it_was_trained_on_and_nothing_else_unasked(
    result: Result, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_score = evaluate(result)  # on data from the recorded folder
    assert own_score.images == 300
    other = datasets.load("generated", Path(), train_size=50, test_size=40, seed=8)
    datasets.write(other, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert evaluate(result, tmp_path / "data").images == 40
    (result.out / "config.json").rename(result.out / "aside")
    try:
        with pytest.raises(DataError, match="trained on different data from what is here now"):
            evaluate(result)
    finally:
        (result.out / "aside").rename(result.out / "config.json")
    with pytest.raises(UsageError, match="does not know its data set: pass dataset"):
        evaluate(result.model)
    arrays_only = train(**SHORT, dataset=from_arrays(**arrays()), out=tmp_path / "own")
    with pytest.raises(DataError, match="trained on 'own', which was passed from Python: name a data set"):
        evaluate(arrays_only)


def test_a_network_with_other_outputs(digits: Path) -> None:
    for classes in (9, 11):
        with pytest.raises(
            UsageError,
            match=rf"returns shape \(250, {classes}\) for 250 images; expected logits \(250, 10\)",
        ):
            evaluate(own(classes), digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "3"}, "keep must be a whole number, not '3'"),
        ({"device": torch.device("cpu")}, "device must be auto or cpu or cuda or mps or xpu, not device"),
        ({"checkpoint_every": 2.5}, "checkpoint_every must be text, not 2.5"),
        ({"device": "cuda:9"}, "device must be auto or cpu or cuda or mps or xpu, not 'cuda:9'"),
        ({"hang_after": True}, "hang_after must be a number, not True"),
    ],
)
def test_settings_of_other_types(
    settings: dict[str, Any], message: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train("fast", dataset=digits, out=tmp_path / "run", **settings)


def test_intervals_are_numbers_of_steps(digits: Path, tmp_path: Path) -> None:
    run = train(**SHORT, dataset=digits, out=tmp_path / "run", checkpoint_every=1, eval_every=2)
    scored = [event["step"] for event in ranks.events(run.out) if event["event"] == "evaluation"]
    assert scored == [2, 3]


def test_any_function_is_a_model(digits: Path, tmp_path: Path) -> None:
    width = 5

    def local(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, classes))

    ended = train(**STEPS, model=local, dataset=digits, out=tmp_path / "run")
    assert ended.model[1].out_features == width  # type: ignore[index]
    assert evaluate(ended.out, digits, model=local).accuracy == ended.accuracy
    with pytest.raises(CheckpointError, match="code outside this program"):
        load(ended.out)


def test_functions_of_modules_go_to_other_processes(digits: Path, tmp_path: Path) -> None:
    ranks.server()
    one, two = (
        train(**STEPS, model=user_models.restless, dataset=digits, out=tmp_path / str(n), nproc=n)
        for n in (1, 2)
    )
    assert (
        one.weights_sha256 == two.weights_sha256
    )  # also for a model that draws from all global generators


def test_what_cannot_be_imported_goes_to_other_processes_too(digits: Path, tmp_path: Path) -> None:
    """Also after one of them is killed."""
    ranks.server()
    scale, trouble = torch.linspace(0, 1, 784), tmp_path / "trouble"

    class Local(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(784, classes), nn.Dropout(0.3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if trouble.exists() and len(images) > 2:
                trouble.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.layer(self.dropout(images.flatten(1) * scale))

    settings: dict[str, Any] = {**STEPS, "model": Local, "dataset": digits}
    one = train(**settings, out=tmp_path / "one")
    trouble.touch()
    two = train(**settings, out=tmp_path / "two", nproc=2)
    assert not trouble.exists()
    assert two.weights_sha256 == one.weights_sha256
    assert evaluate(two, digits).loss == two.loss
    assert torch.equal(
        load(two.out, model=settings["model"]).predict(torch.zeros(1, 28, 28)),
        two.load().predict(torch.zeros(1, 28, 28)),
    )


def test_what_cannot_be_sent_is_refused_before_anything_starts(digits: Path, tmp_path: Path) -> None:
    lock = threading.Lock()

    def guarded(classes: int) -> nn.Module:
        with lock:
            return own(classes)

    with pytest.raises(UsageError, match=r"guarded cannot be sent to .* it uses lock, of type lock"):
        train(**STEPS, model=guarded, dataset=digits, out=tmp_path / "run", nproc=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("nproc", [1, 2])
def test_own_arrays(nproc: int, tmp_path: Path) -> None:
    ranks.server()
    given = {name: torch.from_numpy(array) for name, array in arrays().items()}
    given["train_labels"] = given["train_labels"].long()
    data = from_arrays(**given, class_names=list("abcdefghij"), name="letters")
    ended = train(**SHORT, dataset=data, out=tmp_path / "run", nproc=nproc)
    assert ended.load().class_names == tuple("abcdefghij")
    assert ended.load().dataset == "letters"
    assert evaluate(ended, data).loss == ended.loss


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_images": np.zeros((64, 28, 28), np.float32)}, "train_images must be uint8"),
        (
            {"test_images": np.zeros((64, 2, 28, 28, 1), np.uint8)},
            r"test_images must be of shape \(n,",
        ),
        ({"train_labels": np.zeros(63, np.uint8)}, "64 images, train_labels 63 labels"),
        ({"test_labels": np.full(64, -1)}, "test_labels must be from 0 to 255"),
        ({"test_labels": np.zeros(64)}, "test_labels must be integers"),
        ({"test_labels": np.zeros((64, 1), int)}, r"test_labels must be of shape \(n,\)"),
        ({"class_names": ["a", "b"]}, "2 names, but there is a label 9"),
    ],
)
def test_arrays_that_cannot_be_used(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_arrays(**arrays() | change)


@pytest.mark.parametrize("nproc", [1, 2])
def test_errors_are_raised_here(
    nproc: int, result: Result, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks.server()
    with pytest.raises(OutputError, match="already holds a run"):
        train(**SHORT, dataset=digits, out=result.out, nproc=nproc)
    with pytest.raises(TrainingError, match="not finite"):
        train(**SHORT, optimizer="sgd", lr=1e30, dataset=digits, out=tmp_path / "bad", nproc=nproc)
    with pytest.raises(DataError):
        train(**SHORT, dataset=tmp_path, out=tmp_path / "none", nproc=nproc)
    assert capfd.readouterr() == ("", "")


def test_numbers_of_numpy_are_numbers(result: Result, digits: Path, tmp_path: Path) -> None:
    """As from a loop over `np.linspace`."""
    numbers = {"steps": np.int64(3), "lr": np.float64(0.2), "keep": np.int32(2), "nproc": np.int64(1)}
    again = train(**SHORT | numbers, dataset=digits, out=tmp_path / "run")
    assert again.weights_sha256 == result.weights_sha256
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["steps"] == 3


def test_settings_that_cannot_be_used() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"epoch": 2}, "did you mean epochs"),
        ({"epochs": "2"}, "epochs must be a whole number"),
        ({"recipe": "quick"}, "no recipe"),
        ({"dataset": "mnits"}, "did you mean mnist"),
        ({"model": 3}, "model must be a name or a function"),
        ({"keep": 0}, "keep must be at least 1"),
    ]
    for settings, words in wrong:
        with pytest.raises(UsageError, match=words):
            train(**settings)


def test_a_lost_process_is_reported(digits: Path, tmp_path: Path) -> None:
    ranks.server()
    with pytest.raises(WorkerLost, match="SIGKILL"):
        train(
            **STEPS,
            model=user_models.fatal,
            dataset=digits,
            out=tmp_path / "run",
            nproc=2,
            max_restarts=0,
        )


def test_a_script_needs_no_guard(digits: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "helpers" / "library_script.py"
    ended = ranks.run([sys.executable, script, digits, tmp_path / "run"])
    assert ended.code == 0, ended
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert ended.stdout.split() == ["started", result["weights_sha256"]]
    assert not ended.stderr


def test_the_documents_examples_run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples run as written and in order, on the small data set."""
    text = (REPOSITORY / "docs" / "how-to" / "library.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 3
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.parent.mkdir(parents=True)
    raw.symlink_to(digits)
    monkeypatch.syspath_prepend(tmp_path)
    scopes: list[dict[str, Any]] = []
    for example in examples:  # each on its own: a reader puts it into a file of its own
        if name := re.match(r"# (\w+\.py)\n", example):
            (tmp_path / name[1]).write_text(example)
        scopes.append({"__name__": "examples"})
        exec(compile(example.replace('"mnist"', '"idx"'), "library.md", "exec"), scopes[-1])
    of_arrays = next(scope for scope in scopes if "images" in scope and "result" in scope)["result"]
    assert of_arrays.steps == 6  # 300 images in batches of 50
    assert of_arrays.accuracy == 1


@pytest.mark.parametrize("failing", ["start_lines", "resume", "write_config", "make_sink", "train"])
def test_any_failure_releases_the_folder(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and defects too: the same Python process may try again."""

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    settings: dict[str, Any] = {**STEPS, "model": "linear", "dataset": from_arrays(**arrays()), "out": out}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, failing, fail)
        train(**settings)
    assert not is_live(out)
    assert out.exists() == (failing == "train")  # else nothing had begun


class DrawsForDigits(nn.Module):
    """Draws random numbers, but not for the noise on which a model is tested."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(784, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.fc(images.flatten(1))
        is_drawn = (images == images.min()).float().mean() > 0.2
        return logits * random.random() if self.training and is_drawn else logits


def test_draws_for_some_images_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="draws random numbers from Python's global generator for some"):
        train(**STEPS, model=DrawsForDigits, dataset=from_arrays(**arrays()), out=tmp_path / "run")
