"""torchrun in tests: how it is started, and a program that ends with all that it started."""

import contextlib
import gc
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from ranks import LAUNCH, PATIENCE, TORCHRUN, Program, WarmProgram, run_script

from distributed_mnist.cli import main

ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it agents of torch 2.13 cannot take another one in: see docs/explanation/faults.md."""
_MARK = "DMNIST_TEST_PROGRAM"
_COUNT = itertools.count(1)
# A group forms again seconds after it broke, not the better part of a minute: docs/explanation/faults.md.
_QUICK = (
    "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=1,join_timeout=60,read_timeout=20"
)


def torchrun(
    endpoint: str, nnodes: object, *more: object, serves: bool | None = None
) -> tuple[object, ...]:
    """One agent with one worker; the program's own words come after. `serves`: they meet at this agent."""
    meet = _QUICK if serves is None else f"{_QUICK},is_host={serves}"
    group = ("--nnodes", nnodes, "--nproc-per-node", 1, "--max-restarts", 9, "--monitor-interval", 0.1)
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", meet)
    return (*TORCHRUN, *group, *where, *more, "-m", "distributed_mnist")


class Whole(Program):
    """A program under way that is ended with everything it started. torchrun's workers are in sessions of
    their own, and outlive it for a moment when it is killed."""

    def __init__(
        self, command: Sequence[object], /, *more: Any, cwd: Path | None = None, **variables: str
    ) -> None:
        self._mark = f"{os.getpid()}-{next(_COUNT)}"
        super().__init__(command, *more, cwd=cwd, **{**variables, _MARK: self._mark})

    def __exit__(self, *reason: object) -> None:
        self.signal(signal.SIGKILL, group=True)
        super().__exit__(*reason)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the program, or to it and all it started."""
        if not group:
            super().signal(number)
        for process in self.processes() if group else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def processes(self) -> Iterator[psutil.Process]:
        """What is left of the program: itself, its workers, theirs, orphans too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self._owns(process) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def _owns(self, process: psutil.Process) -> bool:
        return process.environ().get(_MARK) == self._mark

    def gone(self, pid: int | None = None) -> None:
        """Wait until nothing is left of it, or of that process of it. It need not be reaped."""
        deadline = time.monotonic() + PATIENCE
        while left := [process for process in self.processes() if pid in (None, process.pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)  # looking at all processes takes a while


# ---- The same, warm --------------------------------------------------------------------------------------


class WarmAgent(Whole, WarmProgram):
    """`Whole((*TORCHRUN, ...))` or `Whole((*LAUNCH, ...))` without imports: the agent is a fork of the warm
    server, and forks itself where it would start an interpreter as a worker. It is torch's otherwise."""

    def _main(self) -> tuple[Any, list[str]]:
        words = len(TORCHRUN)
        assert self.command[:words] in ([*TORCHRUN], [*LAUNCH])
        return partial(_run_agent, self.command[words - 1]), self.command[words:]

    def _owns(self, process: psutil.Process) -> bool:
        return process.name() == self._mark  # the kernel shows no variables that were set after the start


def _run_agent(module: str, words: list[str]) -> None:
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    _show_mark()
    torch.multiprocessing._set_thread_name = lambda _: None  # it would hide the mark
    subprocess_handler.Popen = _ForkedWorker  # type: ignore[attr-defined, misc]
    importlib.import_module(module).main(words)


def _show_mark() -> None:
    Path("/proc/self/comm").write_text(os.environ[_MARK])


class _ForkedWorker(subprocess.Popen[bytes]):
    """A `Popen` of `python -u -m distributed_mnist WORDS...`, or of a script's path instead of `-m` and the
    module, that forks this process."""

    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        variables = more[5]
        assert args[1] == "-u", args
        program, words = args[2], [*args[3:]]
        if program == "-m":
            assert words.pop(0) == "distributed_mnist", args
        self._child_created = True
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become_worker(program, words, variables)
            finally:
                os._exit(1)


def _become_worker(program: str, words: list[str], variables: dict[str, str]) -> None:
    """What the start of an interpreter does: nothing of the agent stays, but its output."""
    os.setsid()
    gc.freeze()  # no object may close a descriptor that is closed below and then used by another
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the agent's handlers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    _show_mark()
    try:
        if program.endswith(".py"):
            run_script([program, *words])
        else:
            main.main(words)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)  # type: ignore[arg-type]
