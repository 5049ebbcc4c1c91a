"""Write the files of a finished run: its result and its report."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DmnistError, OutputError
from ..runs import layout
from ..runs.lock import RunLock
from ..runs.record import read as read_record
from ..runs.run_files import read_result

_ANSWER = ("steps", "weights_sha256", "samples_sha256", "data_sha256")
"""The fields that are the same whenever and wherever a finished run is resumed."""


def write_results(
    path: Path, lock: RunLock, result: dict[str, Any], unsaved: str | None, say: Callable[[str], None]
) -> None:
    """Write `result.json` and `report.html`, and release the lock of the run's folder.

    `unsaved` says why the final weights are not on disk; None if they are. If the report cannot be written,
    `say` is called and the run still succeeds. Raises `OutputError` if the
    result cannot be written, or if the final weights are not on disk.
    """
    try:
        if result["steps_here"] or not _is_written(path, result):
            layout.write_json(path / "result.json", result)
    except OutputError as error:
        flags = layout.resume_flags(path)
        raise OutputError(f"trained, but {error}; make room, then resume with {flags}") from None
    finally:
        lock.release()
    with contextlib.suppress(OSError):  # the output may be a full disk too
        for text in _write_report(path):
            say(text)
    if unsaved:
        raise OutputError(f"trained, but {unsaved}")


def _is_written(path: Path, result: dict[str, Any]) -> bool:
    """Return whether `result.json` has this result already, and with the speed of the training."""
    try:
        written = read_result(path)
    except CheckpointError:
        return False
    return written is not None and all(written[name] == result[name] for name in _ANSWER)


def _write_report(path: Path) -> list[str]:
    """Write `report.html`; return what the user should know, in one line each.

    A report is for people to look at: no failure in it may fail a run that has trained.
    """
    try:
        from . import html_report  # noqa: PLC0415 - only the end of a run needs what it imports

        record = read_record(path)
        html_report.write([record], path / "report.html")
    except DmnistError as error:
        return [f"no report: {error}"]
    except Exception as error:
        return [f"no report: internal error, please report it: {type(error).__name__}: {error}"]
    return [f"report: {problem}" for problem in record.problems]
