"""`dmnist stop`: ask the run in a folder to save a checkpoint and to end."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from ..errors import Hang, UsageError, WorkerLost
from ..reporting.console import make_console, print_json
from ..runs import layout
from ..runs.lock import Holder, holder_of, is_live
from ..runs.record import read

_POLL_SECONDS = 0.1
_RESTART_SECONDS = 10.0
"""How long the lock of a run may be free while its launcher restarts it."""
_CLOCK_SECONDS = 2.0
"""By how much the start time of one process may differ when it is read twice: the clock may be set."""


def run(*, run: Path, timeout: float, as_json: bool) -> int:
    """Stop the run, or the ensemble, in the folder `run`, and return the exit code.

    Raises `UsageError` if no run is in progress there, or if it cannot be stopped from here, `Hang` if it
    does not end within `timeout` seconds, and `WorkerLost` if it ended without a checkpoint.
    """
    folder, holder = _wait_for_holder(run)
    process = _process(folder, holder)
    if not is_live(folder) or holder_of(folder) != holder:  # the process may have ended meanwhile
        raise UsageError(f"the run in {run} is just ending or restarting: try again")
    try:
        process.send_signal(signal.SIGTERM)  # psutil does not signal another process with this id
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        raise UsageError(f"the run in {run} belongs to {process.username()} ({holder})") from None
    deadline = time.monotonic() + timeout
    while is_live(folder):
        if time.monotonic() > deadline:
            raise Hang(
                f"the run in {run} was asked to stop, but is still running after {timeout:g} s ({holder})"
            )
        time.sleep(_POLL_SECONDS)
    result = _outcome(folder)
    if as_json:
        print_json({"run": str(run), **result})
    else:
        hint = f"\nresume   dmnist train {result['resume']}" if result["resume"] else ""
        make_console().print(f"{result['text']}{hint}", soft_wrap=True)
    return 0


def _wait_for_holder(run: Path) -> tuple[Path, Holder]:
    """Return the folder of a run, or of an ensemble's member that is training, and the lock's holder.

    If the run is restarting, or the ensemble is about to begin its next member, wait. Raises `UsageError`.
    """
    deadline = time.monotonic() + _RESTART_SECONDS
    while True:
        members = layout.members_in(run)
        folder = next((member for member in members if is_live(member)), run)
        live, holder = is_live(folder), holder_of(folder)
        if live and holder is not None:
            return folder, holder
        launchers = [each for each in (holder, *map(holder_of, members)) if each and _is_running(each)]
        between = bool(launchers) and (bool(members) or not _has_ended(folder))
        if not (live or between) or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if live:
        raise UsageError(f"the run in {folder} does not say which process it is: send SIGTERM to it")
    resume = f"it has stopped; resume with dmnist train {layout.resume_flags(folder)}"
    state = "it has finished" if read(folder).state == "finished" else resume
    raise UsageError(f"no run is in progress in {folder}: {state}")


def _has_ended(folder: Path) -> bool:
    record = read(folder)
    return record.state == "finished" or not record.events or record.events[-1]["event"] == "stop"


def _process(folder: Path, holder: Holder) -> psutil.Process:
    """Return the process to signal. Raises `UsageError` if it is not one that can be signalled here."""
    if holder.host != socket.gethostname():
        raise UsageError(
            f"the run in {folder} is on another host: type on {holder.host} "
            f"dmnist stop {folder.absolute()}, or send SIGTERM to {holder.pid} there"
        )
    if holder.started is None:
        raise UsageError(f"the run in {folder} is part of a Python program ({holder}): stop it there")
    try:
        process = psutil.Process(holder.pid)
    except psutil.NoSuchProcess:
        process = None
    if process is None or not _is_running(holder):
        raise UsageError(
            f"the run in {folder} is on this host, but its process cannot be seen from here ({holder}): "
            "type dmnist stop in its container"
        )
    return process


def _is_running(holder: Holder) -> bool:
    """Return whether a process of this host has the holder's id and start time."""
    try:
        started = psutil.Process(holder.pid).create_time()
    except psutil.Error:
        return False
    here = holder.host == socket.gethostname() and holder.started is not None
    return here and abs(started - (holder.started or 0)) <= _CLOCK_SECONDS


def _outcome(folder: Path) -> dict[str, Any]:
    """Return how the run ended, as `--json` prints it. Raises `WorkerLost` if it saved no checkpoint."""
    if not (folder / "metrics.jsonl").exists():
        text = "stopped before there was anything to save"
        return {"state": "stopped", "step": 0, "resume": None, "text": text}
    record = read(folder)
    step, flags = max(layout.newest_step(folder), 0), layout.resume_flags(folder)
    if record.state == "finished":
        return {"state": "finished", "step": step, "resume": None, "text": "the run has just finished"}
    last = record.events[-1]
    if last["event"] != "stop" or last["step"] != step:
        raise WorkerLost(f"the run ended without a checkpoint of its last step; resume with {flags}")
    text = f"stopped after step {step} of {record.starts[-1]['steps']}, checkpoint saved"
    return {"state": "stopped", "step": step, "resume": flags, "text": text}
