"""A captured step is the step as it is written: on the CPU, whose graphs are `recorded_graph`'s here."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded_graph
import torch
from ranks import DMNIST, Finished, WarmProgram, events, free_port

# Four steps in an epoch, of which the last is short: 90, 90, 90 and 50 samples.
STEPS = "--batch-size 90 --epochs 4 --validation 780"
CASES = {
    "tree": "--recipe fast --precision fp32 --model cnn-small --shards 3 --average 0.2",
    "tree, clipped": "--recipe classic --optimizer adamw --weight-decay 0.1 --clip 0.5 --ema 0.9",
    "ddp": "--recipe classic --model cnn-small --sync ddp",
    "exact": "--recipe fast --precision exact --average 0.2",
    "exact, adamw": "--recipe classic --precision exact --optimizer adamw --weight-decay 0.1 --clip 0.5",
}
SIZES = {"tree": (1, 2), "tree, clipped": (2,), "ddp": (1, 2), "exact": (1, 2), "exact, adamw": (1,)}
SAME = ("weights_sha256", "samples_sha256", "test_loss")


def run(
    size: int, out: Path, digits: Path, *words: object, set_up: Callable[[], None] = recorded_graph.set_up
) -> Finished:
    """`dmnist train` on `size` ranks whose CPUs have graphs; how rank 0 ended."""
    where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = (*DMNIST, "train", "--dataset", "idx", "--data", digits, "--out", out, "--json", *words)
    with contextlib.ExitStack() as running:
        programs = [
            running.enter_context(WarmProgram(command, set_up, cwd=None, RANK=str(rank), **where))
            for rank in range(size)
        ]
        ended, *others = [program.finish() for program in programs]
    assert {ended.code, *(other.code for other in others)} == {0}, (ended, others)
    return ended


def results(ended: Finished) -> dict[str, Any]:
    result = json.loads(ended.stdout)
    return {name: result[name] for name in SAME}


def last_phases(out: Path) -> set[str]:
    """The phases of which the time was measured in the last steps of a run."""
    *_, last = (event["seconds"].keys() for event in events(out) if event["event"] == "steps")
    return set(last)


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_has_the_same_bits(case: str, digits: Path, tmp_path: Path) -> None:
    words = [*CASES[case].split(), *STEPS.split(), "--seed", "3"]
    expected = results(run(1, tmp_path / "off", digits, *words, "--cuda-graphs", "off"))
    assert "graph" not in last_phases(tmp_path / "off")
    for size in SIZES[case]:
        out = tmp_path / str(size)
        found = results(run(size, out, digits, *words))
        # Both kinds of steps are captured by now, so nothing runs as it is written.
        assert last_phases(out) >= {"graph"}
        assert "forward" not in last_phases(out)
        if case == "ddp" and size > 1:  # whose rounding depends on the number of ranks
            assert found["samples_sha256"] == expected["samples_sha256"]
            assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
        else:
            assert found == expected


def test_a_captured_run_stops_and_resumes_at_another_size(digits: Path, tmp_path: Path) -> None:
    """A new process takes a few steps as they are written, and captures the next."""
    words = ["--recipe", "classic", *STEPS.split()[:4]]
    whole = results(run(1, tmp_path / "whole", digits, *words, "--cuda-graphs", "off"))
    run(2, tmp_path / "out", digits, *words, "--steps", "7")
    resumed = run(1, tmp_path / "out", digits, *words, "--resume", "auto")
    assert "graph" in last_phases(tmp_path / "out")
    assert results(resumed) == whole


def fail() -> None:
    recorded_graph.set_up(recorded_graph.FailingGraph)


def fail_on_rank_1() -> None:
    recorded_graph.set_up(
        recorded_graph.FailingGraph if os.environ["RANK"] == "1" else recorded_graph.RecordedGraph
    )


@pytest.mark.parametrize(("size", "set_up"), [(1, fail), (2, fail), (2, fail_on_rank_1)])
def test_a_step_that_cannot_be_captured_runs_as_it_is_written(
    size: int, set_up: Callable[[], None], digits: Path, tmp_path: Path
) -> None:
    """Also if it can on other ranks."""
    words = ["--recipe", "classic", *STEPS.split()[:4]]
    expected = results(run(1, tmp_path / "off", digits, *words, "--cuda-graphs", "off"))
    ended = run(size, tmp_path / "out", digits, *words, set_up=set_up)
    assert results(ended) == expected
    fails_here = set_up is fail
    notice = "steps are not captured as graphs: operation not permitted\n"
    assert ended.stderr.count(notice) == fails_here
    assert ("forward" in last_phases(tmp_path / "out")) is fails_here


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--model user_models:dropout", "--model user_models:dropout is your own, and checked"),
        (
            "--optimizer user_functions:two_rates",
            "--optimizer user_functions:two_rates is your own, and checked",
        ),
    ],
)
def test_a_users_own_code_is_not_captured(words: str, reason: str, digits: Path, tmp_path: Path) -> None:
    ended = run(1, tmp_path / "out", digits, "--recipe", "classic", "--steps", "2", *words.split())
    assert f"note     steps are not captured as graphs: {reason} in every step" in ended.stderr


def test_parts_that_change_are_not_captured(digits: Path, tmp_path: Path) -> None:
    words = ["--recipe", "classic", "--precision", "exact", "--steps", "6", "--balance", "auto"]
    ended = run(2, tmp_path / "out", digits, *words)
    assert "steps are not captured as graphs: with --balance auto the parts of a batch" in ended.stderr
    assert "graph" not in last_phases(tmp_path / "out")


def test_a_value_that_is_copied_to_the_cpu_cannot_be_recorded() -> None:
    graph, x = recorded_graph.RecordedGraph(), torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.capture(lambda: x.mul_(float(x.sum())))


def test_a_number_of_the_cpu_is_what_it_was_when_it_was_recorded() -> None:
    """This is how these tests find a step that depends on more than `begin` copies."""
    graph, x, factor = recorded_graph.RecordedGraph(), torch.ones(3), [2.0]
    graph.capture(lambda: torch.add(x * factor[0], 1, out=x))
    factor[0] = 5.0
    graph.replay()
    assert x.tolist() == [3.0] * 3
    x.fill_(10.0)
    graph.replay()
    assert x.tolist() == [21.0] * 3
