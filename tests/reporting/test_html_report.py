"""Test the page of a run: complete, self-contained, true to the files, and safe to open."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import run_folders
from ranks import dmnist, train
from rich.console import Console

from distributed_mnist.errors import OutputError, WorkerLost
from distributed_mnist.reporting import html_report, report_data, watch
from distributed_mnist.reporting.charts import Line, line_chart, smoothed
from distributed_mnist.reporting.progress_bar import Terminal
from distributed_mnist.runs.record import Record, read
from distributed_mnist.runs.timeline import timeline


class Page(HTMLParser):
    """The text, tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses = "", list[str](), list[str]()
        self._silent = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent += tag in ("script", "style")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data + " "


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("report")
    options = ["--dataset", "idx", "--data", digits, "--model", "mlp", "--epochs", "2", "--device", "cpu"]
    train(*options, nproc=2, out=folder / "two")
    train(*options, nproc=1, out=folder / "one")
    train(*options, "--seed", "1", "--lr", "0.003", nproc=1, out=folder / "other")
    return [folder / name for name in ("two", "one", "other")]


def test_every_run_writes_its_page(runs: list[Path]) -> None:
    for run in runs:
        text = (run / "report.html").read_text()
        page, result = Page(text), json.loads((run / "result.json").read_text())
        assert "finished" in page.text
        assert f"{result['test_accuracy']:.2%}".replace("%", " %") in page.text
        for digest in ("weights_sha256", "samples_sha256", "data_sha256"):
            assert result[digest] in page.text
        mistakes = json.loads((run / "mistakes.json").read_text())["mistakes"]
        pictures = [address for address in page.addresses if address.startswith("data:image/png;base64,")]
        assert len(pictures) == len(mistakes) > 0
        assert all(address.startswith(("data:", "#")) for address in page.addresses)  # no network
        assert not re.search(r"url\(|@import|https?://", text)
        assert page.tags.count("svg") == (6 if run.name == "two" else 5)
        assert len(text) < 1_000_000


def test_several_runs_are_compared(runs: list[Path], tmp_path: Path) -> None:
    ended = dmnist("report", *runs, "--out", tmp_path / "page.html", "--json")
    assert json.loads(ended.stdout)["out"] == str(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "3 runs compared" in page.text
    text = " ".join(page.text.split())
    row = re.search(r"weights sha256 (\w+)… (\w+)… = (\w+)… ≠", text)
    assert row, text[:900]
    assert row[1] == row[2] != row[3]
    assert re.search(r"lr 0\.01 0\.01 0\.003", text)
    assert "seed 0 0 1" in text


def test_what_means_nothing_in_exact_arithmetic_is_not_compared(tmp_path: Path) -> None:
    def record(**recipe: Any) -> Record:
        return Record(tmp_path, {"recipe": recipe}, [], [], [], None, None, None)

    exact = [record(sync=sync, shards=8, precision="exact") for sync in ("ddp", "tree")]
    assert report_data.differing(exact) == []
    with_fp32 = report_data.differing([*exact, record(sync="tree", shards=8, precision="fp32")])
    assert ("sync", ["–", "–", "tree"]) in with_fp32  # noqa: RUF001


def test_the_timeline_of_a_killed_run(runs: list[Path], tmp_path: Path) -> None:
    """The run is killed, restarted, and stopped."""
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    start = next(event for event in lines if event["event"] == "start")
    half = lines[: len(lines) // 2]
    again = [{**start, "again": True, "step": 0, "time": start["time"] + 5}]
    notice = [{"event": "notice", "time": start["time"] + 6, "text": "<b>the disk</b> is full"}]
    text = "".join(json.dumps(event) + "\n" for event in [*half, *again, *notice])
    (tmp_path / "metrics.jsonl").write_text(text)
    record = read(tmp_path)
    assert record.state == "stopped"
    kinds = [event.kind for event in timeline(record)]
    assert kinds[0] == "start"
    assert kinds.count("fault") == 2  # started again, stopped
    page = html_report.render([record])
    assert "&lt;b&gt;the disk&lt;/b&gt;" in page
    assert "<b>the disk" not in page
    assert dmnist("report", tmp_path).code == 0
    assert (tmp_path / "report.html").is_file()


def test_many_evaluations_share_one_line(runs: list[Path], tmp_path: Path) -> None:
    record = read(runs[0])
    (evaluation, *_) = record.evaluations
    many = [{**evaluation, "step": step, "test_accuracy": step / 100} for step in range(1, 31)]
    start, end = record.events[0], record.events[-1]
    texts = [event.text for event in timeline(dataclasses.replace(record, events=[start, *many, end]))]
    assert texts[1:-1] == ["30 evaluations, at steps 1 to 30: last test accuracy 30.00%, best 30.00%"]
    few = [event.kind for event in timeline(dataclasses.replace(record, events=[start, *many[:5], end]))]
    assert few == ["start", *["evaluation"] * 5, "end"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No events yet" in html_report.render([read(tmp_path)])


def test_errors(tmp_path: Path, runs: list[Path]) -> None:
    assert "not a run" in dmnist("report", tmp_path).stderr
    assert "report needs a run's folder" in dmnist("report").stderr
    (tmp_path / "file").write_text("")
    ended = dmnist("report", runs[0], "--out", tmp_path / "file" / "page.html")
    assert ended.code == 6


def test_lines_are_drawn_at_the_right_place() -> None:
    chart = line_chart([Line("a", [(0, 0), (1, 10)])], x="epoch", y="{:g}".format)
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (left, low), (right, high) = (tuple(map(float, point.split(","))) for point in points.split())
    assert left < right
    assert low > high  # SVG counts downwards
    assert ">10<" in chart
    assert line_chart([Line("a", [(0, float("nan"))])], x="x", y=str) == ""
    assert line_chart([Line("a", [(0, -1)])], x="x", y=str, log=True) == ""
    assert "&lt;x&gt;" in line_chart([Line("<x>", [(0, 1), (1, 2)])], x="x", y=str)


def test_long_lines_are_thinned_and_keep_their_mean() -> None:
    many = [(float(i), float(i % 2)) for i in range(100_000)]
    chart = line_chart([Line("a", many)], x="x", y="{:g}".format)
    assert len(chart) < 30_000
    assert smoothed([(0, 1), (1, 3), (2, 5)], 2) == [(0, 2), (1, 4)]
    assert smoothed([(0, 1)], 5) == [(0, 1)]


# ---- Damaged folders -------------------------------------------------------------------------------------


def test_reports_of_damaged_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report shows what is readable, and names what is not. Two runs share a page as well."""
    whole, folder = run_folders.write(tmp_path / "whole"), run_folders.write(tmp_path / "run")
    names = ("config.json", "metrics.jsonl", "result.json", "mistakes.json")
    files, rng = {name: (whole / name).read_bytes() for name in names}, random.Random(5)
    with_notes = 0
    for number in range(250):
        for name in rng.sample(names, rng.choice((1, 1, 2, 4))):
            (folder / name).write_bytes(run_folders.damaged(rng, files[name]))
        record = read(folder)
        page = html_report.render([record] if number % 4 else [record, read(whole)])
        assert page.count("Left out: ") == len(record.problems)
        with_notes += bool(record.problems)
        watch.state(folder)
        for name in names:
            (folder / name).write_bytes(files[name])
    assert 125 < with_notes < 250
    (folder / "config.json").write_bytes(b"{")
    assert html_report.run(runs=[folder], out=None, as_json=False) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"dmnist: left out of the report: {folder / 'config.json'} is damaged (Input data"
    )
    assert said.count("\n") == 1


def test_following_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_RESTART_SECONDS", -1.0)
    monkeypatch.setattr(watch, "_POLL_SECONDS", 0.0)
    whole, rng = (run_folders.write(tmp_path) / "metrics.jsonl").read_bytes(), random.Random(6)
    for _ in range(60):
        (tmp_path / "metrics.jsonl").write_bytes(run_folders.damaged(rng, whole))
        shown = Terminal(Console(file=io.StringIO(), force_terminal=True, width=100), ranks=True)
        with contextlib.suppress(WorkerLost):  # the end of the run may be damaged
            assert watch._follow(tmp_path, shown) == 0
        shown.close()


def test_a_report_overwrites_only_reports(tmp_path: Path) -> None:
    folder = run_folders.write(tmp_path / "run")
    mine = tmp_path / "mine.html"
    mine.write_text("<html>precious</html>")
    with pytest.raises(
        OutputError, match=r"mine\.html exists and is not an earlier report: choose another"
    ):
        html_report.run(runs=[folder], out=mine, as_json=False)
    assert mine.read_text() == "<html>precious</html>"
    with pytest.raises(OutputError, match="it is not a file"):
        html_report.run(runs=[folder], out=Path("/dev/null"), as_json=False)
    mine.unlink()
    for _ in range(2):
        assert html_report.run(runs=[folder], out=mine, as_json=False) == 0


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folders.write(tmp_path / os.fsdecode(b"run \xff\x1b[2J"))
    assert html_report.run(runs=[folder], out=None, as_json=False) == 0
    assert "run \\udcff\\x1b[2J/report.html" in capsys.readouterr().out
    assert "run \\udcff" in (folder / "report.html").read_text()
