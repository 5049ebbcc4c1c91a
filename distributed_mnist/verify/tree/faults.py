"""The faults of `dmnist verify --chaos`. Each function injects one fault and returns a description of it.

Each function calls `mark_fault` at the moment it injects the fault. `chaos` then waits until the run has
recovered, and compares the answer.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ...errors import CheckpointError
from ...launcher.signals import obeyed_signals
from ...runs.checkpoint import decode
from .run_with_faults import FaultyRun, RunEndedError
from .training_job import RunFailedError

Fault = Callable[[FaultyRun], str]


def kill(run: FaultyRun) -> str:
    """Kill one worker, or several at once."""
    workers = _workers(run)
    victims = run.rng.sample(workers, run.rng.choice([1, 1, run.rng.randint(1, len(workers))]))
    run.mark_fault()
    return _send(signal.SIGKILL, *victims)


def kill_at_start(run: FaultyRun) -> str:
    """Kill a worker while it starts: as it joins the group, or loads the data or the checkpoint."""
    old: set[psutil.Process] = set()
    if run.has_trained():
        old = set(_workers(run))
        _send(signal.SIGKILL, run.rng.choice(sorted(old, key=lambda worker: worker.pid)))
    new = run.wait_for(lambda: _new_workers(run, old), "it started no new workers")
    time.sleep(run.rng.uniform(0, 1))
    run.mark_fault()
    return _send(signal.SIGKILL, run.rng.choice(new))


def kill_while_saving(run: FaultyRun) -> str:
    """Kill rank 0 at the moment it begins to write a checkpoint."""
    old = _unfinished_checkpoints(run)
    run.wait_for(lambda: _unfinished_checkpoints(run) - old, "it saved no checkpoint", poll_seconds=0.0005)
    victim = run.rank_zero()
    run.mark_fault()
    return _send(signal.SIGKILL, victim)


def stop(run: FaultyRun) -> str:
    """Suspend a worker without ending it, so that it hangs."""
    workers = _workers(run)
    if len(workers) == 1:  # no other rank would notice
        raise RunEndedError
    run.mark_fault()
    return _send(signal.SIGSTOP, run.rng.choice(workers))


def terminate(run: FaultyRun) -> str:
    """Ask the launcher or one worker to stop, as schedulers do; then restart at another size."""
    number = run.rng.choice(obeyed_signals())
    target = run.rng.choice(["launcher", "worker"])
    run.mark_fault()
    done = _send(number, run.command.process if target == "launcher" else run.rng.choice(_workers(run)))
    code = run.command.finish()
    if code == 0:
        raise RunEndedError
    if code != 75:
        raise RunFailedError(
            f"{done} to the {target}, and it ended with code {code}: {run.command.last_line()}"
        )
    run.start()
    return f"{done} to the {target}"


def kill_launcher(run: FaultyRun) -> str:
    """Kill the launcher. Its workers must end soon; then restart at another size."""
    run.mark_fault()
    done = _send(signal.SIGKILL, run.command.process)
    if run.command.finish() == 0:
        raise RunEndedError
    run.start()
    return done


def tear_checkpoint(run: FaultyRun) -> str:
    """Kill all processes and damage the newest checkpoint. The restart must use the one before it."""
    run.wait_for(run.checkpoints, "it saved no checkpoint")
    run.mark_fault()
    run.command.kill()
    newest = run.checkpoints()[-1]
    done = f"{_damage(run, newest)} {newest.name}"
    run.start()

    def noticed() -> bool:
        return any(newest.name in text and "trying the one before" in text for text in run.notices())

    run.wait_for(noticed, f"the run did not report: {done}")
    return done


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
    return run.wait_for(lambda: _new_workers(run, set()), "it has no workers")


def _new_workers(run: FaultyRun, old: set[psutil.Process]) -> list[psutil.Process]:
    """Return the workers that are not in `old`, by pid, so that the seed decides which one is hit."""
    return sorted(set(run.command.workers()) - old, key=lambda worker: worker.pid)


def _unfinished_checkpoints(run: FaultyRun) -> set[str]:
    try:
        return {name for name in os.listdir(run.folder / "checkpoints") if name.endswith(".part")}  # noqa: PTH208
    except OSError:
        return set()


def _send(number: int, *processes: psutil.Process) -> str:
    """Send a signal to processes and return a description.

    A process may have ended in the meantime; the end or the restart of the run will show that.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return f"{signal.Signals(number).name} to {', '.join(f'pid {process.pid}' for process in processes)}"


def _damage(run: FaultyRun, path: Path) -> str:
    """Damage a checkpoint so that it cannot be read, and return a description.

    It is damaged again if it can still be read: a flipped bit may hit padding.
    """
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
