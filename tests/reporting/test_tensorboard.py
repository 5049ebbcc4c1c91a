"""What `--tensorboard` writes, read back with TensorBoard's own reader."""

import contextlib
import json
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import DMNIST, Program, dmnist, free_port

from distributed_mnist.cli.parser import parse
from distributed_mnist.config import MNIST_SHAPE, Recipe
from distributed_mnist.errors import UsageError
from distributed_mnist.reporting.tensorboard import TensorBoard, contact_sheet
from distributed_mnist.runs.record import read

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the extra tensorboard is not installed",
)


def written_events(out: Path) -> Any:
    events = accumulators.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_a_run_and_its_resumption(digits: Path, tmp_path: Path) -> None:
    data = ["--dataset", "idx", "--data", digits, "--device", "cpu", "--nproc", "2"]
    arguments = ["train", "--recipe", "classic", *data, "--out", tmp_path, "--tensorboard"]
    assert dmnist(*arguments, "--steps", "3").code == 0
    ended = dmnist(*arguments, "--epochs", "2", "--resume", "auto", "--json")
    assert ended.code == 0, ended
    result = json.loads(ended.stdout)
    record, written = read(tmp_path), written_events(tmp_path)
    losses = [loss for event in record.steps for loss in event["losses"]]
    points = written.Scalars("loss/train")
    assert [point.step for point in points] == list(range(1, result["steps"] + 1))  # each once
    assert [point.value for point in points] == pytest.approx(losses)
    assert written.Scalars("accuracy/test")[-1].value == pytest.approx(result["test_accuracy"])
    assert {"busy ms/rank 0", "busy ms/rank 1", "exchange ms/rank 1"} <= set(written.Tags()["scalars"])
    assert written.Tags()["images"] == ["mistakes"]
    assert written.Scalars("end/test_loss")[-1].value == pytest.approx(result["test_loss"])
    assert "_hparams_/session_start_info" in written.summary_metadata


def test_the_weights_do_not_depend_on_tensorboard(digits: Path, tmp_path: Path) -> None:
    data = [
        "--dataset",
        "idx",
        "--data",
        digits,
        "--device",
        "cpu",
        "--nproc",
        "1",
        "--steps",
        "2",
        "--json",
    ]
    with_it = dmnist("train", *data, "--out", tmp_path / "a", "--tensorboard")
    without = dmnist("train", *data, "--out", tmp_path / "b")
    assert json.loads(with_it.stdout)["weights_sha256"] == json.loads(without.stdout)["weights_sha256"]
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_scores_have_the_names_of_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}

    class Writer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = (value, step)

        def add_hparams(self, _: Any, metrics: dict[str, float], **__: Any) -> None:
            written.update(metrics)

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path, Recipe(), ["0", "1"], 0, print)
    scores = {"validation_loss": 0.3, "validation_accuracy": 0.8}
    board.log("evaluation", step=7, train_accuracy=0.9, **scores)
    board.log("test", step=5, test_loss=0.4, test_accuracy=0.7)
    result = {"test_accuracy": 0.7, "test_loss": 0.4, "validation_accuracy": 0.8, "train_seconds": 1.0}
    board.log("end", result=result)
    expected = {"loss/validation": (0.3, 7), "accuracy/train": (0.9, 7), "accuracy/validation": (0.8, 7)}
    expected |= {"loss/test": (0.4, 5), "accuracy/test": (0.7, 5)}
    assert written == {**expected, **{f"end/{name}": value for name, value in result.items()}}


def test_a_sheet_of_mistakes(digits: Path, tmp_path: Path) -> None:
    mistake = {"image": "//8=" + "A" * 1044, "label": 0, "predicted": 1}
    sheet = contact_sheet([{**mistake, "image": "/" * 1044 + "/w=="}] * 9, MNIST_SHAPE, ["0", "1"])
    assert sheet.shape == (2 * 74, 8 * 60)
    assert (sheet[2:58, 2:58] == 255).all()
    assert len(set(sheet[60:72, 2:58].ravel())) > 1  # something is written


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mnist.cli.flags_train.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"-m pip install 'distributed-mnist\[tensorboard\]'"):
        parse(["train", "--tensorboard"])


def get_json(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=5) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_tensorboard_shows_it(digits: Path, tmp_path: Path) -> None:
    """Send TensorBoard the requests that its page sends."""
    data = ["--dataset", "idx", "--data", digits, "--device", "cpu", "--nproc", "1"]
    arguments = [
        "train",
        "--recipe",
        "classic",
        *data,
        "--out",
        tmp_path / "runs" / "board",
        "--tensorboard",
    ]
    assert dmnist(*arguments, "--steps", "3").code == 0
    port = free_port()
    command = [
        Path(DMNIST[0]).with_name("tensorboard"),
        "--logdir",
        "runs",
        "--port",
        port,
        "--load_fast=false",
    ]
    root = f"http://127.0.0.1:{port}/data"

    def runs() -> Any:
        with contextlib.suppress(OSError):
            return get_json(f"{root}/runs")

    with Program(command, cwd=tmp_path) as tensorboard:
        assert "board/tensorboard" in tensorboard.wait_for(runs, "its first answer")
        (tags,) = [
            tags
            for run, tags in get_json(f"{root}/plugin/scalars/tags").items()
            if run == "board/tensorboard"
        ]
        assert {"loss/train", "accuracy/test", "rate"} & set(tags) >= {"loss/train", "accuracy/test"}
        assert "mistakes" in get_json(f"{root}/plugin/images/tags")["board/tensorboard"]
