"""Test `dmnist bench`: what each section measures, and that it shows what it writes."""

import json
import os
import statistics
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import WarmProgram, dmnist

from distributed_mnist.bench import sections, throughput, timed_runs
from distributed_mnist.bench.timed_runs import ratios, summary
from distributed_mnist.cli import flags_train, main
from distributed_mnist.errors import DmnistError


def test_the_statistics_of_measurements() -> None:
    row = summary([4.0, 1.0, 2.0])
    assert row["median"] == 2.0
    assert row["deviation"] == pytest.approx(statistics.stdev([4, 1, 2]))
    assert (row["n"], row["min"], row["max"], row["mean"]) == (3, 1.0, 4.0, pytest.approx(7 / 3))
    assert summary([3.0])["deviation"] == 0.0
    assert ratios([4.0, 1.0, 2.0], [2.0, 1.0, 4.0]) == [2.0, 1.0, 0.5]


class Bench:
    """Runs `dmnist bench` in this process."""

    def __init__(self, digits: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._data, self._out, self._capsys = digits, out, capsys

    def measured(self, section: str, *titles: str, nproc: int = 2) -> Any:
        """Run one section and return its figures; check that they are written, and shown."""
        words = ["bench", section, "--dataset", "idx", "--data", self._data, "--recipe", "classic"]
        words += [
            "--nproc",
            nproc,
            "--runs",
            1,
            "--seeds",
            2,
            "--seconds",
            0.01,
            "--out",
            self._out,
            "--json",
        ]
        with pytest.raises(SystemExit) as end:
            main.main([str(word) for word in words])
        stdout, stderr = self._capsys.readouterr()
        assert end.value.code == 0, stderr
        results = json.loads(stdout)
        assert results == json.loads((self._out / "bench.json").read_text())
        assert results.keys() == {"machine", section}
        assert ET.parse(self._out / "bench.svg").getroot().tag.endswith("svg")
        for title in titles:
            assert title in stderr
        return results[section]


@pytest.fixture
def bench(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(digits, tmp_path / "out", capsys)


def test_startup(bench: Bench) -> None:
    """All these programs are fresh ones."""
    rows = bench.measured("startup", "Start-up, from the command to the first step", nproc=1)
    import_torch = rows['python -c "import torch"']["seconds"]["median"]
    assert rows.keys() >= {"dmnist --help", "dmnist train --nproc 1"}
    for row in rows.values():
        assert row["ratio"]["median"] == pytest.approx(row["seconds"]["median"] / import_torch)


PLAIN_LOOP = """
from distributed_mnist.bench import baseline

mp = baseline.mp
mp.spawn = lambda *arguments, **more: mp.start_processes(*arguments, **more, start_method="fork")
baseline.main()
"""


@pytest.fixture
def warm_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs that are timed be forks of the warm server, except the plain loop with one process.
    `test_startup` runs a fresh `dmnist`."""
    script = tmp_path / "plain_loop.py"
    script.write_text(PLAIN_LOOP)
    fresh = timed_runs.output

    def output(command: Sequence[str], cores: int | None = None) -> str:
        python, option, module, *words = command
        assert (python, option) == (sys.executable, "-m")
        if module == "distributed_mnist":
            ended = dmnist(*words)
        elif words[words.index("--nproc") + 1] == "1":
            return fresh(command, cores)
        else:
            with WarmProgram([script, *words]) as program:
                ended = program.finish()
        assert ended.code == 0, ended
        return ended.stdout

    monkeypatch.setattr(timed_runs, "output", output)
    monkeypatch.setattr(throughput, "output", output)


@pytest.mark.slow
def test_scaling(bench: Bench, warm_programs: None) -> None:
    results = bench.measured("scaling", "Throughput of classic", "A step, in milliseconds")
    rows = {(row["way"], row["nproc"]): row for row in results["rows"]}
    assert rows.keys() == {(method, n) for method in ("tree", "ddp", "exact", "plain loop") for n in (1, 2)}
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


def test_a_program_that_is_timed_gets_its_cores() -> None:
    command = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    before = os.sched_getaffinity(0)
    assert timed_runs.output(command, cores=1) == "1\n"
    assert os.sched_getaffinity(0) == before
    assert timed_runs.output(command) == f"{len(before)}\n"


def test_a_program_that_fails_is_reported() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('dmnist: no such thing')"]
    with pytest.raises(DmnistError, match="no such thing"):
        timed_runs.output(command)


# Each of 21 measurements takes half a second in two processes. Python runs this whenever it starts.
SHORTER = """
import sys
if any("forkserver" in word for word in sys.orig_argv):  # the server that forks the processes
    from distributed_mnist.bench import exchange
    exchange._SECONDS_PER_LENGTH = 0.01
"""


def test_exchange(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHORTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    results = bench.measured("exchange", "One sum of a vector over all processes")
    assert results["link"]["latency"] > 0
    assert {row["how"] for row in results["rows"]} >= {"doubling", "halving", "slices"}
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert {row["size"] for row in results["predictions"]} >= {8, 1024}


def test_time_to_99(bench: Bench, warm_programs: None) -> None:
    results = bench.measured("time-to-99", "Recipe fast")
    assert results.keys() == {"nproc", "seeds", "tree"}
    rows = results["tree"]
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
    ended = dmnist("bench", "data", "--dataset", "generated", "--runs", 1)
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
