"""What can happen to a run, each as a function that does it and says what it did.

Each of them calls `mark` at the moment it strikes. What comes after is not theirs: `chaos` waits for the
run to go on, and compares what it comes to.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ..errors import CheckpointError
from ..launcher.signals import SIGNALS
from ..runs.checkpoint import decode
from .job import RunFailedError
from .run_with_faults import FaultyRun, RunEndedError

Fault = Callable[[FaultyRun], str]


def kill(run: FaultyRun) -> str:
    """One worker, or several at once."""
    workers = _workers(run)
    victims = run.rng.sample(workers, run.rng.choice([1, 1, run.rng.randint(1, len(workers))]))
    run.mark()
    return _send(signal.SIGKILL, *victims)


def kill_at_start(run: FaultyRun) -> str:
    """A worker that has not got anywhere yet: as it joins the others, loads the data or the checkpoint."""
    known: set[psutil.Process] = set()
    if run.moving():
        known = set(_workers(run))
        _send(signal.SIGKILL, run.rng.choice(sorted(known, key=lambda worker: worker.pid)))
    fresh = run.await_(lambda: _fresh(run, known), "it started no new workers")
    time.sleep(run.rng.uniform(0, 1))
    run.mark()
    return _send(signal.SIGKILL, run.rng.choice(fresh))


def kill_while_saving(run: FaultyRun) -> str:
    """Rank 0, at the moment at which a checkpoint begins to be written."""
    seen = _parts(run)
    run.await_(lambda: _parts(run) - seen, "it saved no checkpoint", glance=0.0005)
    victim = run.rank(0)
    if victim is None:
        raise RunEndedError
    run.mark()
    return _send(signal.SIGKILL, victim)


def stop(run: FaultyRun) -> str:
    """A worker, without ending it: it hangs."""
    workers = _workers(run)
    if len(workers) == 1:  # nobody is there to wait for it
        raise RunEndedError
    run.mark()
    return _send(signal.SIGSTOP, run.rng.choice(workers))


def terminate(run: FaultyRun) -> str:
    """As schedulers and people do, the launcher or one worker; then the same command at another size."""
    number = run.rng.choice(SIGNALS)
    whom = run.rng.choice(["launcher", "worker"])
    run.mark()
    told = _send(number, run.trial.process if whom == "launcher" else run.rng.choice(_workers(run)))
    code = run.trial.finish()
    if code == 0:
        raise RunEndedError
    if code != 75:
        raise RunFailedError(
            f"{told} to the {whom}, and it ended with code {code}: {run.trial.last_words()}"
        )
    run.start_again()
    return f"{told} to the {whom}"


def kill_launcher(run: FaultyRun) -> str:
    """Its workers must be gone soon; then the same command at another size."""
    run.mark()
    told = _send(signal.SIGKILL, run.trial.process)
    if run.trial.finish() == 0:
        raise RunEndedError
    run.start_again()
    return told


def tear_checkpoint(run: FaultyRun) -> str:
    """Everything is killed, and the newest checkpoint damaged: the one before it must do."""
    run.await_(run.checkpoints, "it saved no checkpoint")
    run.mark()
    run.trial.end()
    newest = run.checkpoints()[-1]
    told = f"{_damage(run, newest)} {newest.name}"
    run.start_again()

    def noticed() -> bool:
        return any(newest.name in text and "trying the one before" in text for text in run.complaints())

    run.await_(noticed, f"nothing was said of {told}")
    return told


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill at start-up": kill_at_start,
    "kill while saving": kill_while_saving,
    "stop": stop,
    "terminate": terminate,
    "kill the launcher": kill_launcher,
    "torn checkpoint": tear_checkpoint,
}


def _workers(run: FaultyRun) -> list[psutil.Process]:
    return run.await_(
        lambda: sorted(run.trial.workers(), key=lambda worker: worker.pid), "it has no workers"
    )


def _fresh(run: FaultyRun, known: set[psutil.Process]) -> list[psutil.Process]:
    return sorted(set(run.trial.workers()) - known, key=lambda worker: worker.pid)


def _parts(run: FaultyRun) -> set[str]:
    """Checkpoints that are being written."""
    try:
        return {name for name in os.listdir(run.folder / "checkpoints") if name.endswith(".part")}  # noqa: PTH208
    except OSError:
        return set()


def _send(number: int, *processes: psutil.Process) -> str:
    """Processes that have ended meanwhile are past caring: the run's end or its restart will show."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return f"{signal.Signals(number).name} to {', '.join(f'pid {process.pid}' for process in processes)}"


def _damage(run: FaultyRun, path: Path) -> str:
    """Damage a checkpoint so that it cannot be used; what was done. A flipped bit may hit padding."""
    whole = path.read_bytes()
    while True:
        data = bytearray(whole)
        kind = run.rng.choice(["emptied", "truncated", "flipped a bit of"])
        if kind == "emptied":
            data.clear()
        elif kind == "truncated":
            del data[run.rng.randrange(len(data)) :]
        else:
            data[run.rng.randrange(len(data))] ^= 1 << run.rng.randrange(8)
        try:
            decode(bytes(data), path.name)
        except CheckpointError:
            path.write_bytes(data)
            return kind
