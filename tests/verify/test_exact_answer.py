"""Test the known-answer test in exact arithmetic: that it finds wrong bits and names where they are."""

import io
import json
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from ranks import run_ranks
from rich.console import Console

from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError, VerificationError
from distributed_mnist.verify.exact import command
from distributed_mnist.verify.exact.answer import job_sha256, read_answer, to_toml
from distributed_mnist.verify.exact.command import phases
from distributed_mnist.verify.exact.diagnosis import Report, judge
from distributed_mnist.verify.exact.injection import Injection, flip_bit
from distributed_mnist.verify.results_table import ResultsTable

KNOWN = {"a": "1", "b": "2"}
RIGHT = Report(own={"x": "1", **KNOWN}, received=KNOWN, again=[{"x": "1", **KNOWN}] * 2, total=KNOWN)


def test_the_answer_belongs_to_this_job() -> None:
    known = read_answer()
    assert known.job_sha256 == job_sha256(), "run docs/reference/make_exact_answer.py"
    assert len(known.sums) == len(known.steps) == len(known.weights) - 1 == 20
    assert known.weights_sha256.startswith(known.steps[-1])
    assert len(set(known.steps)) == len(known.steps)
    assert known.weights_sha256 in to_toml(known)


# ---- Who is wrong ----------------------------------------------------------------------------------------


def test_a_rank_whose_own_part_was_wrong_once() -> None:
    wrong = replace(RIGHT, own={**RIGHT.own, "x": "9", "b": "9"}, received={"a": "1", "b": "9"})
    received = replace(RIGHT, received={"a": "1", "b": "9"})
    (finding,) = judge([4, 5], [received, wrong], KNOWN, 7)
    assert (finding.rank, finding.step, finding.what) == (5, 7, "x")
    assert finding.repeated == "right when repeated"


def test_a_rank_that_received_another_sum() -> None:
    received = replace(RIGHT, received={"a": "1", "b": "9"})
    (finding,) = judge([0, 1], [RIGHT, received], KNOWN, 7)
    assert (finding.rank, finding.what) == (1, "the sum that it received: b")


def test_a_rank_that_is_wrong_again_is_outvoted_by_the_known_answer() -> None:
    bad = {"x": "1", "a": "1", "b": "9"}
    always = Report(own=bad, received=KNOWN, again=[bad, bad], total={"a": "1", "b": "18"})
    (finding,) = judge([0, 1], [always, RIGHT], KNOWN, 7)
    assert (finding.rank, finding.what, finding.repeated) == (0, "b", "wrong again when repeated")


def test_without_the_known_answer_the_majority_decides() -> None:
    other = {"a": "1", "b": "3"}
    bad = Report(own=other, received=KNOWN, again=[other] * 3, total=other)
    good = Report(own=KNOWN, received=KNOWN, again=[KNOWN] * 3, total=KNOWN)
    (finding,) = judge([0, 1, 2], [bad, good, good], {"a": "7", "b": "7"}, 1)
    assert (finding.rank, finding.what) == (0, "b")


def test_ranks_that_agree_on_another_answer_are_all_named() -> None:
    findings = judge([0, 1], [RIGHT, RIGHT], {"a": "1", "b": "7"}, 1)
    assert [(finding.rank, finding.what) for finding in findings] == [(0, "b"), (1, "b")]


# ---- Phases and injection --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_every_rank_meets_every_other(size: int) -> None:
    met: Counter[tuple[int, ...]] = Counter()
    rounds = size - 1 + size % 2
    for number in range(rounds):
        groups = phases(size, number, pairs=True)[2].groups
        assert sorted(rank for group in groups for rank in group) == list(range(size))
        met.update(tuple(group) for group in groups if len(group) == 2)
    assert len(met) == size * (size - 1) // 2
    assert set(met.values()) == {1}


@pytest.mark.parametrize("text", ["", "1", "1:0", "x:1", "1:1:bit", "1:-1", "1:1:weight:2"])
def test_bad_injections_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--inject must be RANK:STEP"):
        Injection.parse(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_bit_is_flipped(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 4, dtype=dtype).t()
    for seed in range(20):
        before = tensor.clone()
        flip_bit(tensor, Random(seed))
        assert (tensor != before).sum() == 1
        flip_bit(tensor, Random(seed))
        assert torch.equal(tensor, before)


# ---- The test itself, with the first steps of the job ---------------------------------------------------


def shorter(steps: int) -> None:
    """Leave only the first steps of the job."""
    known = read_answer()
    short = replace(
        known, steps=known.steps[:steps], sums=known.sums[:steps], weights=known.weights[: steps + 1]
    )
    command.read_answer = lambda: short
    command.Test._is_known_result = lambda self: True  # type: ignore[method-assign]


def verify_with(world: World, inject: str | None) -> tuple[str, list[dict[str, str]]]:
    """Verify the first steps; return the text and the findings."""
    shorter(1)
    text = io.StringIO()
    table = ResultsTable(Console(file=text, width=1000), as_json=False)
    try:
        command.run(world, table, minutes=None, inject=inject, seed=1)
    except VerificationError:
        assert table.problems
    return text.getvalue(), json.loads(json.dumps(table.json_fields["findings"]))


def alone(inject: str | None) -> tuple[str, list[dict[str, str]]]:
    return verify_with(World(ALONE, torch.device("cpu"), "none"), inject)


def test_two_ranks_find_a_wrong_sum_and_name_the_rank() -> None:
    for text, findings in run_ranks(verify_with, 2, "1:1:message"):
        (finding,) = findings
        assert (finding["rank"], finding["step"]) == (1, 1)
        assert finding["what"].startswith("the sum that it received: ")
        assert finding["repeated"] == "right when repeated"
        assert "rank 1 alone" in text
        assert "FAIL" in text


def test_a_single_process_names_a_weight_that_changed_in_memory() -> None:
    text, (finding,) = alone("0:1:weight")
    assert finding["what"].startswith("in memory, the value of ")
    assert "this process (" in text


def test_an_activation_that_autograd_has_saved_can_be_flipped() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    saved = x.relu()
    flip_bit(saved, Random(0))
    saved.sum().backward()  # would raise if autograd had noticed
    assert x.grad is not None
