"""The files at the end of a run: no failure of the report may fail a run that has trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import run_folders

from distributed_mnist.errors import OutputError
from distributed_mnist.reporting import html_report
from distributed_mnist.reporting.results import write_results
from distributed_mnist.runs.lock import RunLock


def end(folder: Path, result: dict[str, Any], unsaved: str | None = None) -> list[str]:
    """Write the results of a run, and return what it says."""
    said: list[str] = []
    write_results(folder, RunLock(folder), result, unsaved, said.append)
    return said


@pytest.mark.parametrize(
    "error",
    [KeyError("first_step"), UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_the_report_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    run_folders.write(tmp_path)
    monkeypatch.setattr(html_report, "render", fail)
    (line,) = end(tmp_path, run_folders.result(steps_here=7))
    assert line.startswith("no report: ")
    assert type(error).__name__ in line
    assert json.loads((tmp_path / "result.json").read_text())["steps_here"] == 7


def test_a_report_in_whose_place_is_another_file(tmp_path: Path) -> None:
    run_folders.write(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    assert "report.html exists and is not an earlier report" in end(tmp_path, run_folders.result())[0]
    (tmp_path / "report.html").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert "has no metrics.jsonl" in end(tmp_path, run_folders.result())[0]


def test_an_output_that_is_gone(tmp_path: Path) -> None:
    def gone(_: str) -> None:
        raise BrokenPipeError

    run_folders.write(tmp_path)
    (tmp_path / "mistakes.json").write_text("{")
    write_results(tmp_path, RunLock(tmp_path), run_folders.result(), None, gone)
    assert (tmp_path / "report.html").exists()


def test_a_finished_run_keeps_its_result(tmp_path: Path) -> None:
    path = run_folders.write(tmp_path) / "result.json"
    before = path.read_bytes()
    nothing_done = run_folders.result(steps_here=0, seconds_here=0.0, images_per_second=None)
    end(tmp_path, nothing_done)
    assert path.read_bytes() == before
    other = {**nothing_done, "weights_sha256": "9" * 64}
    for result, content in ((other, None), (nothing_done, b"{"), (run_folders.result(steps_here=1), None)):
        if content is not None:
            path.write_bytes(content)
        end(tmp_path, result)
        assert json.loads(path.read_text()) == result


def test_weights_that_are_not_on_disk_fail_the_run(tmp_path: Path) -> None:
    run_folders.write(tmp_path)
    with pytest.raises(OutputError, match="trained, but no room"):
        end(tmp_path, run_folders.result(), unsaved="no room")
