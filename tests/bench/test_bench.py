"""Test `dmnist bench`: what each section measures, and that it shows what it writes."""

import json
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from ranks import dmnist

from distributed_mnist.bench import sections
from distributed_mnist.bench.timed_runs import ratios, summary
from distributed_mnist.cli import flags_train

SMALL = ("--dataset", "generated", "--nproc", 2, "--runs", 2, "--seeds", 2, "--seconds", 0.05)


def test_the_statistics_of_measurements() -> None:
    row = summary([4.0, 1.0, 2.0])
    assert row["median"] == 2.0
    assert row["deviation"] == pytest.approx(statistics.stdev([4, 1, 2]))
    assert (row["n"], row["min"], row["max"], row["mean"]) == (3, 1.0, 4.0, pytest.approx(7 / 3))
    assert summary([3.0])["deviation"] == 0.0
    assert ratios([4.0, 1.0, 2.0], [2.0, 1.0, 4.0]) == [2.0, 1.0, 0.5]


def measured(section: str, digits: Path, out: Path, *titles: str) -> Any:
    """Run one section and return its figures; check that they are written, and shown under these titles."""
    flags = (
        "--dataset",
        "idx",
        "--data",
        digits,
        "--nproc",
        2,
        "--runs",
        1,
        "--seeds",
        2,
        "--seconds",
        0.05,
    )
    ended = dmnist("bench", section, *flags, "--recipe", "classic", "--out", out, "--json")
    results = ended.json()
    assert results == json.loads((out / "bench.json").read_text())
    assert results.keys() == {"machine", section}
    assert ET.parse(out / "bench.svg").getroot().tag.endswith("svg")
    for title in titles:
        assert title in ended.stderr
    return results[section]


def test_startup(tmp_path: Path, digits: Path) -> None:
    rows = measured("startup", digits, tmp_path, "Start-up, from the command to the first step")
    import_torch = rows["python -c 'import torch'"]["seconds"]["median"]
    assert len(rows) == 4
    for row in rows.values():
        assert row["ratio"]["median"] == pytest.approx(row["seconds"]["median"] / import_torch)


@pytest.mark.slow
def test_scaling(tmp_path: Path, digits: Path) -> None:
    results = measured("scaling", digits, tmp_path, "Throughput of classic", "A step, in milliseconds")
    rows = {(row["way"], row["nproc"]): row for row in results["rows"]}
    assert rows.keys() == {(method, n) for method in ("tree", "ddp", "plain loop") for n in (1, 2)}
    for (method, nproc), row in rows.items():
        speed, alone = (
            measured_row["images_per_second"]["median"] for measured_row in (row, rows[method, 1])
        )
        assert speed > 0
        assert row["of_one_process"]["median"] == pytest.approx(speed / alone)
        if method == "plain loop":
            continue
        parts = row["parts"]
        assert parts.keys() >= {"data", "forward", "backward", "exchange", "optimizer", "step"}
        assert sum(seconds for name, seconds in parts.items() if name != "step") <= parts["step"] * 1.1
        assert (parts["exchange"] > 0) == (nproc > 1)


def test_exchange(tmp_path: Path, digits: Path) -> None:
    results = measured("exchange", digits, tmp_path, "One sum of a vector over all processes")
    assert results["link"]["latency"] > 0
    assert {row["how"] for row in results["rows"]} >= {"doubling", "halving", "slices"}
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert {row["size"] for row in results["predictions"]} >= {8, 1024}


def test_time_to_99(tmp_path: Path, digits: Path) -> None:
    rows = measured("time-to-99", digits, tmp_path, "Recipe fast")
    accuracy = rows["test accuracy, %"]
    assert accuracy["n"] == 2
    assert accuracy["min"] <= accuracy["mean"] <= accuracy["max"]
    training, all_steps, command = (
        rows[name]["mean"] for name in ("training, s", "first step to last weight, s", "whole command, s")
    )
    assert training <= all_steps < command


def test_the_flags_know_the_sections() -> None:
    assert tuple(sections.SECTIONS) == flags_train.SECTIONS


def test_only_the_given_section_is_measured() -> None:
    ended = dmnist("bench", "data", *SMALL)
    assert ended.code == 0, ended
    assert "a generated image" in ended.stdout
    assert "Throughput" not in ended.stdout


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["speed"], ["bench has no section 'speed'; there are startup, data"]),
        (["--runs", "0"], ["--runs", "at least 1"]),
        (["--seconds", "0"], ["--seconds", "above zero"]),
        (["--nproc", "9"], ["9 processes", "8 shards"]),
        (["--recipe", "none"], ["there is no recipe 'none'"]),
        (["--dataset", "letters"], ["letters"]),
    ],
)
def test_bad_flags_are_refused(flags: list[str], parts: list[str]) -> None:
    ended = dmnist("bench", *flags)
    assert ended.code == 2, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert all(part in ended.stderr for part in parts), ended


def test_it_is_refused_under_another_launcher() -> None:
    ended = dmnist(
        "bench", "data", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1"
    )
    assert ended.code == 2, ended
    assert "run it alone, not under environment" in ended.stderr
