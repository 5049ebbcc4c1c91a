"""Test the known-answer test in exact arithmetic: that it finds wrong bits and names where they are."""

import io
import json
import tomllib
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from torch import Tensor

from distributed_mnist.common.placement import ALONE
from distributed_mnist.distributed.world import World
from distributed_mnist.errors import UsageError, VerificationError
from distributed_mnist.exact.products.float64 import Float64Products
from distributed_mnist.exact.products.interface import Prepared, Rows
from distributed_mnist.verify import command
from distributed_mnist.verify.answer import ANSWER_FILE, job_sha256, read_answer, to_toml
from distributed_mnist.verify.diagnosis import Report, Suspect, judge, suspect
from distributed_mnist.verify.injection import Injection, flip_bit
from distributed_mnist.verify.job import ExactJob
from distributed_mnist.verify.phases import phases
from distributed_mnist.verify.results_table import ResultsTable

KNOWN = {"x": "3", "a": "1", "b": "2"}
PARTS = [{"x": "1", "a": "8", "b": "8"}, {"x": "2", "a": "9", "b": "9"}]


def report(rank: int, **fields: Any) -> Report:
    """What a healthy rank of two reports, with some fields changed."""
    usual = {"own": PARTS[rank], "received": KNOWN, "again": PARTS, "total": KNOWN}
    return Report(**{**usual, **fields})


def test_the_answer_belongs_to_this_job() -> None:
    known = read_answer()
    assert known.job_sha256 == job_sha256(), "run docs/reference/make_exact_answer.py"
    assert len(known.steps) == len(known.weights) - 1 == len(known.weights_sha256) - 1 == 20
    assert len(set(known.weights_sha256)) == 21
    assert tomllib.loads(to_toml(known)) == tomllib.loads(ANSWER_FILE.read_text())


# ---- Who is wrong ----------------------------------------------------------------------------------------


def test_a_rank_whose_own_part_was_wrong_once() -> None:
    received = {**KNOWN, "x": "9", "b": "9"}
    wrong = report(1, own={**PARTS[1], "x": "8", "b": "9"}, received=received)
    (finding,) = judge([4, 5], [report(0, received=received), wrong], KNOWN, 7)
    assert (finding.rank, finding.step, finding.what, finding.received) == (5, 7, "x", False)
    assert finding.repeated == "right when repeated"
    assert suspect(finding, [4, 5]) == Suspect(5)


def test_a_rank_that_received_another_sum() -> None:
    (finding,) = judge([0, 1], [report(0), report(1, received={**KNOWN, "b": "9"})], KNOWN, 7)
    assert (finding.rank, finding.what, finding.received) == (1, "b", True)
    assert suspect(finding, [0, 1]) == Suspect(1, sender=0)
    assert suspect(finding, [0, 1, 2]) == Suspect(1, sender=-1)


def test_a_rank_that_is_wrong_again() -> None:
    bad = {**PARTS[0], "b": "7"}
    total = {**KNOWN, "b": "0"}
    always = report(0, own=bad, received=total, again=[bad, PARTS[1]], total=total)
    (finding,) = judge([0, 1], [always, report(1, received=total)], KNOWN, 7)
    assert (finding.rank, finding.what, finding.repeated) == (0, "b", "wrong again when repeated")


def test_ranks_that_agree_on_another_answer_are_all_named() -> None:
    total = {**KNOWN, "a": "7"}
    findings = judge([0, 1], [report(rank, received=total, total=total) for rank in (0, 1)], KNOWN, 7)
    repeated = "wrong again when repeated, and 1 other rank computed the same"
    assert [(f.rank, f.what, f.repeated) for f in findings] == [(0, "a", repeated), (1, "a", repeated)]


def test_a_single_rank_that_is_always_wrong_names_the_first_layer() -> None:
    wrong = {**KNOWN, "a": "7", "b": "7"}
    (finding,) = judge([0], [Report("", wrong, wrong, [wrong], wrong)], KNOWN, 1)
    assert (finding.what, finding.repeated) == ("a", "wrong again when repeated")


# ---- Phases and injection --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_every_rank_meets_every_other(size: int) -> None:
    met: Counter[tuple[int, ...]] = Counter()
    rounds = size - 1 + size % 2
    for number in range(rounds):
        groups = phases(size, number, pairs=True)[2].groups
        ranks = [rank for group in groups for rank in group]
        assert len(ranks) == len(set(ranks)) == size - size % 2, "of an odd number one waits"
        met.update(tuple(group) for group in groups if len(group) == 2)
    assert len(met) == size * (size - 1) // 2
    assert set(met.values()) == {1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1:0",
        "x:1",
        "1:1:bit",
        "1:-1",
        "1:1:weight:2",
        "1-1:2",
        "0-1:2:weight",
        "²:1",
        "1:1:",
        "-1:2",
    ],
)
def test_bad_injections_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--inject must be RANK:STEP"):
        Injection.parse(text)


def test_injections_that_the_group_cannot_have_are_refused() -> None:
    Injection.parse("0-1:20").require(2, 20)
    for text, line in (
        ("2:1", "--inject 2:1:weight: the ranks are 0 to 1 .*, the steps 1 to 20"),
        ("2-0:1", "--inject 2-0:1:message: the ranks are 0 to 1"),
        ("0:21:activation", "--inject 0:21:activation: the ranks are"),
    ):
        with pytest.raises(UsageError, match=line):
            Injection.parse(text).require(2, 20)
    with pytest.raises(UsageError, match="a single process receives no messages"):
        Injection.parse("0:1:message").require(1, 20)


def test_a_bad_link_flips_bits_only_between_its_ranks() -> None:
    link = Injection.parse("0-2:3")
    assert link.due(2, 3, [0, 2], last=False)
    assert link.due(2, 3, [0, 1, 2], last=True)
    assert not link.due(2, 3, [1, 2], last=False)
    assert not link.due(0, 3, [0, 2], last=False)
    once = Injection.parse("2:3:message")
    assert [once.due(2, 3, [0, 2], last=last) for last in (True, False)] == [True, False]


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


def verify_with(
    world: World, inject: str | None, minutes: float | None = None
) -> tuple[str, dict[str, Any]]:
    """Verify the first step; return the text and the fields of `--json`."""
    known = read_answer()
    first = replace(known, steps=known.steps[:1], weights_sha256=known.weights_sha256[:2])
    text = io.StringIO()
    table = ResultsTable(Console(file=text, width=1000), as_json=False)
    with mock.patch.object(command, "read_answer", lambda: first):
        try:
            command.run(world, table, minutes=minutes, inject=inject, seed=1)
        except VerificationError:
            assert table.problems
    return text.getvalue(), json.loads(json.dumps(table.json_fields))


def test_on_a_terminal_a_problem_is_wrapped_beside_its_label() -> None:
    text = io.StringIO()
    table = ResultsTable(
        Console(file=text, width=40, force_terminal=True, color_system=None), as_json=False
    )
    table.problems = [" ".join(["words"] * 20)]
    with pytest.raises(VerificationError):
        table.conclude()
    first, *others = text.getvalue().strip().splitlines()
    assert first.startswith("FAIL  words")
    assert len(others) >= 2
    assert all(line.startswith("      words") and len(line) <= 40 for line in others)


def test_two_ranks_find_a_wrong_sum_and_name_the_link() -> None:
    for text, fields in run_ranks(verify_with, 2, "1:1:message"):
        (finding,) = fields["findings"]
        assert (finding["rank"], finding["step"], finding["received"]) == (1, 1, True)
        assert (fields["suspects"][0]["rank"], fields["suspects"][0]["sender"]) == (1, 0)
        assert "✓ rank 1 alone" in text
        assert "✗ all together" in text
        assert "FAIL  the link from rank 0 (" in text


def test_a_bad_link_is_told_from_a_bad_device() -> None:
    text, fields = run_ranks(verify_with, 3, "1-2:1", 1e-6)[0]
    links = {(each["rank"], each["sender"]): each["failures"] for each in fields["suspects"]}
    assert links == {(2, None): 1, (2, 1): 1}, "all together any link may be bad, in pairs it is one"
    assert {each["what"] for each in fields["suspects"]} == {"link"}
    assert "✗ ranks 1 and 2" in text
    assert "1 round in " in text


def test_a_single_process_names_a_weight_that_changed_in_memory() -> None:
    text, fields = verify_with(World(ALONE, torch.device("cpu"), "none"), "0:1:weight")
    (finding,) = fields["findings"]
    assert finding["what"].startswith("in memory, the value of ")
    assert finding["repeated"] == "right when repeated"
    assert "FAIL  this process (" in text


def test_a_flipped_activation_names_its_layer() -> None:
    text, fields = verify_with(World(ALONE, torch.device("cpu"), "none"), "0:1:activation")
    (finding,) = fields["findings"]
    assert finding["what"].startswith("the input of layer ")
    assert "not found" not in text


def test_a_machine_whose_products_are_always_wrong_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Float64Products):
        def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
            result = super().multiply(rows, prepared, dtype)
            return result * 1.001 if prepared[0].shape == (10, 256) else result  # the last layer's

    monkeypatch.setattr("distributed_mnist.exact.passes.training_pass.products_for", lambda device: Wrong())
    _, fields = verify_with(World(ALONE, torch.device("cpu"), "none"), None)
    (finding,) = fields["findings"]
    assert finding["what"] == "the gradient at the output of layer 9 (Linear)"
    assert finding["repeated"] == "wrong again when repeated"


def test_machines_with_other_products_have_the_same_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "distributed_mnist.exact.passes.training_pass.products_for"
    monkeypatch.setattr(where, lambda device: Float64Products())
    job = ExactJob(torch.device("cpu"))
    job.add_part(0, 0, 1)
    assert job.trace() == read_answer().steps[0]


def test_an_optimizer_step_that_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = ExactJob.finish

    def wrong(job: ExactJob, step: int) -> None:
        finish(job, step)
        flip_bit(job.weights()[5], Random(0))

    monkeypatch.setattr(ExactJob, "finish", wrong)
    text, fields = verify_with(World(ALONE, torch.device("cpu"), "none"), None)
    (finding,) = fields["findings"]
    assert finding["what"] == "after the optimizer's step, the value of 7.bias"
    assert text.rstrip().endswith("step 1: after the optimizer's step, the value of 7.bias is wrong")


def test_an_activation_that_autograd_has_saved_can_be_flipped() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    saved = x.relu()
    flip_bit(saved, Random(0))
    saved.sum().backward()  # would raise if autograd had noticed
    assert x.grad is not None
