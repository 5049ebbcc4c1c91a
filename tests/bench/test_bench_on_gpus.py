"""What `dmnist bench` would run on a machine with GPUs, and the tables that it would show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distributed_mnist.bench import command, sections, session, throughput, whole_runs
from distributed_mnist.bench.session import Gpus
from distributed_mnist.bench.timed_runs import TimedTraining
from distributed_mnist.cli import main
from distributed_mnist.config import Recipe
from distributed_mnist.runs.record import Record

EAGER_STEP, GRAPH_STEP, BATCH = 0.02, 0.002, 512


class Machine:
    """A machine with two GPUs: its programs do not run, but are written down, and end as they would."""

    def __init__(self) -> None:
        self.trained: list[dict[str, str]] = []
        self.other_programs: list[Sequence[str]] = []

    def train(self, folder: Path, *flags: str, cores: int | None = None) -> TimedTraining:
        assert cores is None  # a GPU's program may use every core
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        self.trained.append(given)
        step = EAGER_STEP if given.get("--cuda-graphs") == "off" else GRAPH_STEP
        nproc = int(given["--nproc"])
        slow, usual = (
            {
                "losses": [0.5] * count,
                "seconds": {"step": seconds},
                "images_per_second": nproc * BATCH / seconds,
                "time": 12.0,
            }
            for count, seconds in ((1, 3.0), (int(given.get("--steps", 100)), step))
        )
        result = {"test_accuracy": 0.99, "train_seconds": 0.12, "dataset": "mnist"}
        record = Record(folder, {}, [{"event": "start", "time": 11.0}], [slow, usual], [], None, None, None)
        return TimedTraining(result, record, began=10.0, wall_seconds=3.0)

    def output(self, command: Sequence[str], cores: int | None = None) -> str:
        assert cores is None
        self.other_programs.append(command)
        return json.dumps({"images_per_second": 1_000.0, "epochs": []})

    def seconds_of(self, command: Sequence[str]) -> float:
        self.other_programs.append(command)
        return 2.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(command, "find_gpus", lambda device: Gpus("cuda", "NVIDIA H200", 2))
    monkeypatch.setattr(session, "train", machine.train)
    monkeypatch.setattr(throughput, "output", machine.output)
    for module in (sections, whole_runs):
        monkeypatch.setattr(module, "seconds_of", machine.seconds_of)
    for on_the_cpu in ("data", "exchange"):
        monkeypatch.setitem(sections.SECTIONS, on_the_cpu, lambda bench: {})
    return machine


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], str]:
    """What `dmnist bench` writes as JSON, and what it shows."""
    shorter = ["--dataset", "generated", "--runs", 1, "--seeds", 2, "--json"]
    with pytest.raises(SystemExit) as end:
        main.main([str(word) for word in ("bench", *words, *shorter)])
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 0, stderr
    return json.loads(stdout), stderr


def test_scaling_compares_graphs_with_eager_steps(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results, shown = bench(capsys, "scaling", "--recipe", "fast", "--seconds", 1, "--out", tmp_path)
    assert results["machine"]["gpus"] == "2 × NVIDIA H200"  # noqa: RUF001
    rows = {(row["way"], row["nproc"]): row for row in results["scaling"]["rows"]}
    methods = ("tree", "ddp", "exact")
    ways = {*methods, *(f"{method}, eager" for method in methods), "plain loop"}
    assert rows.keys() == {(way, n) for way in ways for n in (1, 2)}  # one per GPU
    for method in methods:
        assert rows[method, 1]["images_per_second"]["median"] == pytest.approx(BATCH / GRAPH_STEP)
        assert rows[f"{method}, eager", 1]["of_ddp"]["median"] == pytest.approx(GRAPH_STEP / EAGER_STEP)
    for given in machine.trained:
        assert given["--device"] == "auto"
        trial = given["--steps"] == str(throughput._TRIAL_STEPS)
        step = EAGER_STEP if given.get("--cuda-graphs") == "off" else GRAPH_STEP
        assert trial or int(given["--steps"]) == int(given["--nproc"]) / step  # of one second
    assert sum("--cuda-graphs" in given for given in machine.trained) == len(machine.trained) / 2
    for program in machine.other_programs:
        assert "distributed_mnist.bench.baseline" in program
        assert program[-2:] == ["--device", "cuda"]
    assert "over NCCL" in shown
    assert "forward" not in shown  # its time would be that of launching it
    assert "tree, eager" in (tmp_path / "bench.svg").read_text()


def test_recipes_are_shown_beside_their_aims(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    results, shown = bench(capsys)
    assert results.keys() == {"machine", "startup", "data", "scaling", "exchange", "time-to-99", "recipes"}
    lines = {tuple(line.split()[:2]): line.split() for line in shown.splitlines() if line}
    assert lines["fast", "tree"][2:] == ["0.120", "0.15", "1.00", "3.00", "1.50", "99.00"]
    assert lines["fast", "ddp"][3] == "0.1"
    assert lines["default", "tree"][3] == "0.6"
    assert lines["accurate", "ddp"][3] == "15"
    assert "Recipe fast on mnist, tree, 2 processes, 2 seeds" in shown
    assert "Recipe fast on mnist, ddp, 2 processes, 2 seeds" in shown
    import_torch = [program[-1] for program in machine.other_programs if program[1] == "-c"]
    assert import_torch == ["import torch; torch.ones(1, device='cuda')"] * 2
    assert results["startup"]["dmnist train --nproc 1"]["ratio"]["median"] == 1.0 / 2.0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_mps_has_no_exact_arithmetic(kind: str) -> None:
    ways = throughput.ways_to_train(Recipe(), Gpus(kind, "one", 1))
    assert ("exact" in ways) is (kind != "mps")


def test_the_cpu_can_be_asked_for() -> None:
    assert session.find_gpus("cpu") is None
