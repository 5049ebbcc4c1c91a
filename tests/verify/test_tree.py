"""Test `dmnist verify --sync tree`: what it compares and prints, and that it finds a rank that differs."""

import io
import json
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import run_folders
import torch
from ranks import TORCHRUN, dmnist, run
from rich.console import Console

from distributed_mnist.common.digest import digest
from distributed_mnist.distributed.peer import Peer
from distributed_mnist.errors import VerificationError
from distributed_mnist.verify.results_table import ResultsTable
from distributed_mnist.verify.tree.command import SoloResult, recipe_for, show_solo_results
from distributed_mnist.verify.tree.compare import Answer, compare, losses_in, read_events
from distributed_mnist.verify.tree.known_answers import (
    Platform,
    look_up,
    read_table,
    report_known_answer,
    this_platform,
    toml_row,
)
from distributed_mnist.verify.tree.training_job import DATA, recipe

HERE = Platform(torch="9.9", machine="x86_64", device="cpu", model="Some CPU", capability="AVX512")
RESULT = {"data_sha256": "d" * 64, "samples_sha256": "e" * 64, "weights_sha256": "f" * 64, "test_loss": 0.5}


def answer(losses: Sequence[float] = (3.0, 2.0, 1.0), weight: float = 0.25, **fields: Any) -> Answer:
    weights = {"a": torch.tensor([1.0, weight]), "b": torch.zeros(2, 2)}
    return Answer({**RESULT, **fields}, dict(enumerate(losses, start=1)), weights)


def make_table() -> tuple[ResultsTable, io.StringIO]:
    text = io.StringIO()
    return ResultsTable(Console(file=text, width=1000), as_json=False), text


# ---- Comparing ----------------------------------------------------------------------------------------


def test_equal_answers_do_not_differ() -> None:
    assert compare(answer(), answer()) is None


def test_a_difference_names_its_first_step_and_its_size() -> None:
    difference = compare(answer(), answer((3.0, 2.5, 1.5), weight=0.75, weights_sha256="0" * 64))
    assert difference is not None
    assert difference.fields == ("weights_sha256", "losses")
    assert (difference.step, difference.losses, difference.largest) == (2, (2.0, 2.5), 0.5)
    assert str(difference) == (
        "the weights and the losses of the steps differ, first at step 2 (loss 2.0 and 2.5, 0.5 apart); "
        "final weights are up to 0.5 apart"
    )


def test_other_samples_are_reported_even_if_no_loss_differs() -> None:
    difference = compare(answer(), answer(samples_sha256="0" * 64, data_sha256="0" * 64))
    assert str(difference) == "the data and the samples and their order differ"


def test_a_loss_that_differs_is_a_difference_even_if_the_weights_are_equal() -> None:
    difference = compare(answer(), answer((3.0, math.nextafter(2.0, 3.0), 1.0)))
    assert difference is not None
    assert (difference.fields, difference.step) == (("losses",), 2)


def test_weights_of_another_shape_cannot_be_compared() -> None:
    other = replace(answer(weights_sha256="0" * 64), weights={"a": torch.zeros(3)})
    assert "the weights cannot be compared" in str(compare(answer(), other))


def test_the_later_loss_of_a_repeated_step_counts_and_torn_lines_are_skipped(tmp_path: Path) -> None:
    lines = [
        run_folders.steps(3, 1, losses=[9.0, 8.0, 7.0]),
        run_folders.start(1),
        run_folders.steps(2, 2, losses=[5.0]),
    ]
    text = "\n".join([*map(json.dumps, lines[:2]), '{"event": "st', json.dumps(lines[2])])
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"eve')
    assert losses_in(read_events(tmp_path)) == {1: 9.0, 2: 5.0, 3: 7.0}
    assert read_events(tmp_path / "nothing") == []


# ---- Known answers ---------------------------------------------------------------------------------------


def table(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"data_sha256": "d" * 64, "samples_sha256": "e" * 64, "answer": list(rows)}


def row(sha256: str, here: Platform = HERE, **more: str) -> dict[str, Any]:
    return {**asdict(here), **more, "weights_sha256": sha256}


def test_a_known_platform_has_one_answer() -> None:
    assert look_up(RESULT, HERE, table(row("f" * 64))).verdict == "equal"
    finding = look_up(RESULT, HERE, table(row("0" * 64)))
    assert finding.verdict == "differs"
    assert "ffffffffffff DIFFERS from this platform's known answer, 000000000000" in finding.text


def test_an_answer_is_explained_by_the_setting_it_was_measured_with() -> None:
    rows = (row("0" * 64), row("f" * 64, setting="ONEDNN_MAX_CPU_ISA=AVX2"))
    finding = look_up(RESULT, HERE, table(*rows))
    assert finding.verdict == "differs"
    assert finding.text.endswith(
        "it is the answer of Some CPU, AVX512, torch 9.9 with ONEDNN_MAX_CPU_ISA=AVX2"
    )


@pytest.mark.parametrize("field", ["torch", "machine", "device", "model", "capability"])
def test_every_part_of_a_platform_counts(field: str) -> None:
    other = replace(HERE, **{field: "other"})
    finding = look_up(RESULT, HERE, table(row("0" * 64, other)))
    assert finding.verdict == "unknown"
    assert "not in the table" in finding.text


def test_a_row_with_a_setting_is_expected_of_no_platform() -> None:
    assert look_up(RESULT, HERE, table(row("0" * 64, setting="X=1"))).verdict == "unknown"


@pytest.mark.parametrize("name", ["data_sha256", "samples_sha256"])
def test_integers_are_the_same_everywhere(name: str) -> None:
    finding = look_up({**RESULT, name: "0" * 64}, HERE, table(row("f" * 64)))
    assert finding.verdict == "differs"
    assert "the same on every platform" in finding.text


def test_an_unknown_platform_is_reported_with_its_row_ready_to_paste() -> None:
    here = replace(this_platform(torch.device("cpu")), model="never seen")
    results_table, text = make_table()
    known = read_table()
    report_known_answer(
        {**RESULT, **{k: known[k] for k in ("data_sha256", "samples_sha256")}}, here, results_table
    )
    assert results_table.problems == []
    assert results_table.json_fields["known_answer"]["verdict"] == "unknown"
    assert results_table.json_fields["row"] in text.getvalue()
    assert tomllib.loads(results_table.json_fields["row"])["answer"] == [row("f" * 64, here)]


def test_a_wrong_known_answer_is_a_failure() -> None:
    known = read_table()
    first = next(row for row in known["answer"] if "setting" not in row)
    here = Platform(**{name: first[name] for name in asdict(HERE)})
    right = {name: known[name] for name in ("data_sha256", "samples_sha256")}
    results_table, _ = make_table()
    report_known_answer({**RESULT, **right, "weights_sha256": first["weights_sha256"]}, here, results_table)
    assert results_table.problems == []
    report_known_answer({**RESULT, **right}, here, results_table)
    assert len(results_table.problems) == 1
    with pytest.raises(VerificationError):
        results_table.conclude()


def test_the_table_belongs_to_this_job_and_has_every_platform_once() -> None:
    known = read_table()
    assert known["job_sha256"] == digest([recipe().to_dict(), DATA]), "measure the rows again"
    keys = [(*(row[name] for name in asdict(HERE)), row.get("setting")) for row in known["answer"]]
    assert len(set(keys)) == len(keys)
    for answer_row in known["answer"]:
        assert len(bytes.fromhex(answer_row["weights_sha256"])) == 32
        assert answer_row.keys() - {"setting", "weights_sha256"} == asdict(HERE).keys()


def test_a_row_is_toml() -> None:
    assert tomllib.loads(toml_row(HERE, "a" * 64))["answer"] == [row("a" * 64)]


# ---- Groups ----------------------------------------------------------------------------------------------


def test_larger_worlds_get_enough_shards() -> None:
    assert recipe_for(8) == recipe()
    assert recipe_for(9).shards == 16
    assert recipe_for(33).shards == 64


def test_a_rank_that_computes_differently_from_most_is_reported() -> None:
    def solo_result(rank: int, host: str, sha256: str, platform: Platform = HERE) -> SoloResult:
        return SoloResult(Peer(rank, host, 10 + rank), platform, answer(weights_sha256=sha256), 1.0, "kept")

    results_table, _ = make_table()
    odd = solo_result(0, "bad", "0" * 64, replace(HERE, capability="AVX2"))
    reference = show_solo_results(
        [odd, solo_result(1, "good", "1" * 64), solo_result(2, "good", "1" * 64)], results_table
    )
    assert reference.peer.rank == 1
    assert len(results_table.problems) == 1
    assert results_table.problems[0].startswith(
        "rank 0 (pid 10 on bad) computes differently from 2 of 3: the weights"
    )
    assert "a different platform (capability AVX2, not AVX512)" in results_table.problems[0]


def test_a_work_folder_is_kept_only_if_there_are_problems() -> None:
    results_table, text = make_table()
    with results_table.work_folder() as good:
        (good / "file").write_text("")
    assert not good.exists()
    with results_table.work_folder() as bad:
        results_table.problems.append("this")
    assert bad.exists()
    assert str(bad) in text.getvalue()
    bad.rmdir()


def test_json_has_what_the_table_shows(capsys: pytest.CaptureFixture[str]) -> None:
    results_table = ResultsTable(Console(quiet=True), as_json=True)
    results_table.add("1 process", "a" * 64, 1.5, None, "reference")
    results_table.conclude()
    result = json.loads(capsys.readouterr().out)
    assert (result["passed"], result["wrong"]) == (True, [])
    assert result["runs"][0]["weights_sha256"] == "a" * 64


# ---- The command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--faults 3", "--faults only goes with --chaos"),
        ("--seed 3", "--seed only goes with --chaos or --inject"),
        ("--minutes 0", "--minutes must be above zero, not 0.0"),
        ("--minutes 1 --sync tree", "--minutes does not go with --sync tree"),
        ("--inject 1:7 --chaos", "--inject does not go with --chaos"),
        ("--chaos --sync tree", "--chaos does not go with --sync tree: it trains the same job"),
        ("--inject 1:0", "FROM-TO:STEP, as in 1:7:weight or 0-1:7, not '1:0'; KIND is weight, activation"),
        ("--inject 1:2 --nproc 1", "--inject 1:2:weight: the only rank is 0 (--nproc"),
        ("--chaos --faults 0", "--faults must be at least 1, not 0"),
        ("--chaos --seed -1", "--seed"),
        ("--nproc 0", "--nproc must be at least 1"),
        ("--chaos --nproc 9", "--nproc must be between 1 and 8, not 9"),
        ("surplus", "verify got an unexpected argument 'surplus'"),
        ("--sync trees", "--sync must be tree, not 'trees'"),
        ("--device tpu", "--device must be auto, cpu, cuda, mps or xpu"),
    ],
)
def test_bad_flags(flags: str, line: str) -> None:
    ended = dmnist("verify", *flags.split())
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended
    assert line in ended.stderr


def test_chaos_is_refused_under_another_launcher() -> None:
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    ended = dmnist("verify", "--chaos", **world)
    assert ended.code == 2
    assert "run it alone on a host" in ended.stderr


@pytest.mark.slow
def test_a_correct_machine_passes(tmp_path: Path) -> None:
    ended = dmnist(
        "verify", "--sync", "tree", "--nproc", 2, "--device", "cpu", "--json", TMPDIR=str(tmp_path)
    )
    assert ended.code == 0, ended
    result = ended.json()
    assert result["passed"], ended
    assert [run["what"].split(" (")[0] for run in result["runs"]] == ["rank 0", "rank 1", "2 processes"]
    assert {run["weights_sha256"] for run in result["runs"]} == {result["weights_sha256"]}
    assert result["known_answer"]["verdict"] in ("equal", "unknown")
    assert ended.stderr.splitlines()[-1] == "PASS"
    assert list(tmp_path.iterdir()) == [], "folders of runs that were right are deleted"


ONE_ODD_RANK = """
import os
if os.environ["RANK"] == "1":
    os.environ["ATEN_CPU_CAPABILITY"] = "default"

from distributed_mnist.cli.main import main
from distributed_mnist.verify.tree import command, training_job

# A shorter job than the one with known answers: the first step shows the difference.
training_job.DATA.update(train_size=400, test_size=99)
command.recipe_for = lambda size: training_job.recipe().replace(epochs=1)
main(["verify", "--sync", "tree", "--device", "cpu", "--json"])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has only one set of instructions"
)
def test_a_rank_that_computes_differently_is_reported(tmp_path: Path) -> None:
    """Run two ranks under torchrun, one of them without the processor's vector instructions."""
    script = tmp_path / "verify.py"
    script.write_text(ONE_ODD_RANK)
    ended = run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", 2, script],
        TMPDIR=str(tmp_path),
        PYTHONPATH=":".join(sys.path),
    )
    assert ended.code == 1, ended
    result = json.loads(ended.stdout)
    assert not result["passed"]
    assert [run["good"] for run in result["runs"]] == [True, False]
    (wrong,) = result["wrong"]
    assert wrong.startswith("rank 1 (pid ")
    assert "computes differently from rank 0" in wrong
    assert "first at step 1 " in wrong
    assert "apart" in wrong
    assert "capability DEFAULT, not " in wrong
    assert "exitcode  : 9" in ended.stderr
