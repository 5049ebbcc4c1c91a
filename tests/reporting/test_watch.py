"""Test the straggler tracker, and `dmnist watch`."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from ranks import dmnist, train
from rich.console import Console

from distributed_mnist.errors import Interrupted, UsageError, WorkerLost
from distributed_mnist.reporting import watch
from distributed_mnist.reporting.progress_bar import Terminal, rank_table
from distributed_mnist.reporting.stragglers import StragglerTracker
from distributed_mnist.reporting.watch import Tail

RANKS = [{"rank": i, "host": f"node{i // 2}", "pid": 100 + i} for i in range(4)]


def tracker_of(busy: list[float], exchange: list[float]) -> StragglerTracker:
    tracker = StragglerTracker()
    tracker.start_group(RANKS)
    tracker.add({"busy": busy, "exchange": exchange})
    return tracker


def test_the_slowest_rank_waits_least() -> None:
    tracker = tracker_of([0.06, 0.05, 0.09, 0.06], [0.04, 0.05, 0.01, 0.04])
    assert tracker.slowest_rank == 2
    assert tracker.waiting_share == pytest.approx((0.03 + 0.04 + 0.03) / 3 / 0.1)
    assert tracker.summary() == "slowest: rank 2 on node1; the others wait 33% of a step for it"


def test_even_ranks() -> None:
    assert tracker_of([0.1] * 4, [0.011, 0.010, 0.011, 0.011]).summary().startswith("ranks even")
    assert tracker_of([0.1], [0.0]).summary() == ""
    assert tracker_of([0.1] * 4, [0.0] * 4).summary() == ""  # a device that hides what is exchange
    assert StragglerTracker().summary() == ""


def test_times_are_smoothed_and_start_again_with_a_new_group() -> None:
    tracker = tracker_of([0.1, 0.1], [0.0, 0.1])
    tracker.add({"busy": [0.1, 0.1], "exchange": [0.1, 0.0]})
    assert tracker.slowest_rank == 0  # one odd interval changes nothing
    for _ in range(4):
        tracker.add({"busy": [0.1, 0.1], "exchange": [0.1, 0.0]})
    assert tracker.slowest_rank == 1
    tracker.add({"busy": [1.0] * 3, "exchange": [2.0] * 3})  # another world size
    assert tracker.busy == [1.0] * 3


def test_a_table_of_many_ranks_fits() -> None:
    console = Console(width=80, height=24, record=True)
    many = StragglerTracker()
    many.add({"busy": [0.01] * 1024, "exchange": [0.002] * 1023 + [0.001]})
    ranks = [{"rank": i, "host": f"n{i}", "pid": i} for i in range(1024)]
    console.print(rank_table(ranks, many, 5))
    lines = console.export_text().splitlines()
    assert lines[1].split()[:2] == ["1023", "n1023"]
    assert "and 1019 faster ranks" in lines[6]
    assert max(map(len, lines)) <= 80


def test_uneven_parts_are_a_column_and_half_a_sentence() -> None:
    def shown(shares: list[float]) -> tuple[str, str]:
        console, tracker = Console(width=80, height=24, record=True), StragglerTracker()
        tracker.add({"busy": [0.01, 0.01], "exchange": [0.002, 0.001], "share": shares})
        console.print(rank_table(RANKS[:2], tracker, 5))
        return console.export_text(), tracker.summary()

    table, line = shown([0.52, 0.48])
    assert "of batch" not in table + line
    table, line = shown([0.9, 0.1])
    assert table.split("\n")[1].split()[:4] == ["1", "node0", "101", "10.0%"]
    assert line.endswith("for it; parts 10% to 90%")


def test_only_new_and_complete_events_are_read(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    with pytest.raises(UsageError, match="not a run"):
        tail.new_events()
    path = tmp_path / "metrics.jsonl"
    one, two = (json.dumps({"event": "notice", "time": 1, "text": text}) + "\n" for text in ("one", "two"))
    path.write_text(one + two[:9])
    assert [event["text"] for event in tail.new_events()] == ["one"]
    assert tail.new_events() == []
    path.write_text(one + two + two)
    assert [event["text"] for event in tail.new_events()] == ["two", "two"]
    path.write_text(two)  # another run in its place
    assert [event["text"] for event in tail.new_events()] == ["two"]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("watch") / "run"
    options = ["--dataset", "idx", "--data", digits, "--model", "mlp", "--epochs", "2", "--device", "cpu"]
    train(*options, nproc=3, out=out)
    return out


def test_a_finished_run_is_told_as_train_told_it(run: Path) -> None:
    ended = dmnist("watch", run)
    assert ended.code == 0
    result = json.loads((run / "result.json").read_text())
    assert f"weights sha256  {result['weights_sha256']}" in ended.stdout
    assert ended.stdout.count("test loss") == 3  # two epochs, and the end
    state: dict[str, Any] = json.loads(dmnist("watch", run, "--json").stdout)
    assert state["state"] == "finished"
    assert state["step"] == state["steps"] == result["steps"]
    assert state["test_accuracy"] == result["test_accuracy"]
    assert len(state["ranks"]["busy"]) == 3
    assert state["slowest_rank"] in (0, 1, 2)


def test_a_run_that_goes_on_is_followed_to_its_end(run: Path, tmp_path: Path) -> None:
    """Written line by line while it is watched."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines[0])
    console = Console(width=100, record=True, force_terminal=True)

    def write() -> None:
        for line in lines[1:]:
            with path.open("a") as file:
                file.write(line)

    writer = threading.Thread(target=write)
    writer.start()
    assert watch._follow(tmp_path, Terminal(console, ranks=True)) == 0
    writer.join()
    assert "weights sha256" in console.export_text()


def test_it_waits_for_a_run_to_begin(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=100, record=True)

    def begin() -> None:
        (tmp_path / "later").symlink_to(run)

    starter = threading.Timer(0.3, begin)
    starter.start()
    monkeypatch.setattr(watch, "make_console", lambda: console)
    assert watch.run(run=tmp_path / "later", as_json=False) == 0
    starter.join()
    text = console.export_text()
    assert text.count(f"no run in {tmp_path / 'later'} yet") == 1
    assert "weights sha256" in text
    monkeypatch.setattr(watch, "_START_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UsageError, match="is not a run"):
        watch.run(run=tmp_path / "never", as_json=False)


def test_a_run_that_was_asked_to_stop_ends_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    stop = json.dumps({"event": "stop", "time": 1.0, "step": 7}) + "\n"
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]) + stop)
    with pytest.raises(Interrupted, match=r"after step 7: resume with dmnist train --resume auto --out"):
        watch._follow(tmp_path, Terminal(Console(quiet=True)))
    live = iter([True, True, False])  # it has restarted already, and has recorded nothing yet
    monkeypatch.setattr(watch, "is_live", lambda _: next(live))
    with pytest.raises(Interrupted):
        watch._follow(tmp_path, Terminal(Console(quiet=True)))
    assert next(live, "used up") == "used up"


def test_a_run_that_no_process_trains_any_more(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert json.loads(dmnist("watch", tmp_path, "--json").stdout)["state"] == "stopped"
    monkeypatch.setattr(watch, "_RESTART_SECONDS", 0.0)
    with pytest.raises(
        WorkerLost,
        match=r"no process trains .* its last event was [\d,]+ s ago at step \d+: .* --resume auto --out",
    ):
        watch._follow(tmp_path, Terminal(Console(quiet=True)))
    shutil.copy(
        run / "result.json", tmp_path
    )  # the run finished: only its record was cut short by a full disk
    assert watch._follow(tmp_path, Terminal(Console(quiet=True))) == 0
