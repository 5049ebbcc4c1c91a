"""Test that `on_event` gets what `metrics.jsonl` gets, and that `Result.history` has each step once."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import user_functions

from distributed_mnist import Result, train

RUN: dict[str, Any] = {"recipe": "classic", "epochs": 4, "schedule": "step", "decay_every": 2}
Event = dict[str, Any]


def written(out: Path) -> list[Event]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(events: list[Event]) -> list[Event]:
    return [{**event, "time": 0} for event in events]


@pytest.fixture(scope="module")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Event]]:
    """Return the result of a run in this process, and its events."""
    events: list[Event] = []
    out = tmp_path_factory.mktemp("one") / "out"
    return train(**RUN, dataset=digits, out=out, on_event=events.append), events


def test_gets_what_the_file_gets(one: tuple[Result, list[Event]]) -> None:
    result, events = one
    assert untimed(events) == untimed(written(result.out))
    assert [events[0]["event"], events[-1]["event"]] == ["start", "end"]


def test_a_restart_repeats_no_event_and_loses_none(digits: Path, tmp_path: Path) -> None:
    """Steps that are trained again have events again, after a second `start`."""
    ranks.server()
    events: list[Event] = []
    later, over = tmp_path / "two" / "checkpoints" / "step_00000030.pt", tmp_path / "killed"

    def slow(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        deadline = time.monotonic() + 60
        while later.exists() and not over.exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # the event of step 10 may come late on a busy machine
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def kill_once(event: Event) -> None:
        killed = "checkpoint" in [event["event"] for event in events]
        events.append(event)
        if event["event"] == "checkpoint" and not killed:
            os.kill(events[0]["ranks"][1]["pid"], signal.SIGKILL)
            over.touch()

    run = {**RUN, "epochs": 20, "checkpoint_every": 10, "eval_every": 50, "loss": slow, "dataset": digits}
    result = train(**run, out=tmp_path / "two", nproc=2, on_event=kill_once)
    assert events == written(result.out)
    starts = [event for event in events if event["event"] == "start"]
    assert [start["again"] for start in starts] == [False, True]
    assert starts[1]["step"] in range(10, 100, 10)
    assert result.history["step"].tolist() == list(range(1, 101))
    assert result.history["evaluation_step"].tolist() == [50, 100]


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_error_ends_the_run(digits: Path, tmp_path: Path, nproc: int) -> None:
    ranks.server()
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if event["event"] == "checkpoint":
            raise ZeroDivisionError("enough")

    endless = {**RUN, "epochs": 100_000, "checkpoint_every": 12, "dataset": digits, "out": tmp_path}
    with pytest.raises(ZeroDivisionError, match="enough"):
        train(**endless, nproc=nproc, on_event=stop)
    assert [event["event"] for event in events].count("checkpoint") == 1
    last, reported = written(tmp_path)[-1], events[-1]["step"]
    if nproc > 1:
        assert last["event"] == "stop"
        assert (tmp_path / "checkpoints" / f"step_{last['step']:08}.pt").exists()
    resumed: list[Event] = []
    with pytest.raises(ZeroDivisionError):
        train(**endless, resume="auto", on_event=lambda event: (resumed.append(event), stop(event)))
    assert resumed[0]["event"] == "start"  # not those of the first part
    if nproc > 1:
        assert resumed[0]["step"] == last["step"]
    else:  # a checkpoint that is being written is finished
        assert resumed[0]["step"] >= reported


def test_history(one: tuple[Result, list[Event]]) -> None:
    result, events = one
    history = result.history
    assert history["step"].tolist() == list(range(1, result.steps + 1))
    assert history["loss"].tolist() == [
        loss for e in events if e["event"] == "steps" for loss in e["losses"]
    ]
    assert history["lr"][[0, -1]] == pytest.approx([0.001, 0.0001])
    assert history["epoch"][-1] == history["evaluation_epoch"][-1] == 4
    assert history["evaluation_step"].tolist() == [5, 10, 15, 20]
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert history[name].tolist() == [e[name] for e in events if e["event"] == "evaluation"]
    assert np.isclose(history["test_accuracy"][-1], result.accuracy)


def test_plots_are_the_report(one: tuple[Result, list[Event]]) -> None:
    page = one[0].plot()
    assert page.html == (one[0].out / "report.html").read_text()
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_functions_of_one_name(digits: Path, tmp_path: Path) -> None:
    """The functions of two lambdas are not confused."""
    run = {**RUN, "steps": 2}
    result = train(
        **run,
        dataset=digits,
        out=tmp_path / "out",
        model=lambda classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, classes)),
        loss=lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none") / 2,
        optimizer=lambda parameters, lr: user_functions.Lion(parameters, lr=lr),
    )
    names = result.load().recipe.code()
    assert names["model"] + ".loss" == names["loss"]
    assert names["model"] + ".optimizer" == names["optimizer"]
