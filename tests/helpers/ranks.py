"""Real processes for tests: the ranks of a group, and the program as its users start it.

- `run_ranks(function, 3)` calls `function(world)` in three processes and returns what each returned.
- `train(..., nproc=3, out=...)` and `dmnist(...)` run the command in processes forked from one warm server
  that has imported torch already: a fraction of a second each. A process of its own parses the real
  command line; what is shared is the import.
- `run(command)` and `Program(command)` start a fresh program, as a user does, in a session of its own.
- `WarmProgram((*DMNIST, ...))` is the same program without its imports: launcher, fork server and workers
  are processes of their own as usual, but forked from the warm server.

All of them wait for a bounded time and end what they started.
"""

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, util
from pathlib import Path
from typing import Any, Self

import pytest

from distributed_mnist.cli import main
from distributed_mnist.common.placement import Placement
from distributed_mnist.launcher import fork_server, spawn

REPOSITORY = Path(__file__).resolve().parents[2]
DMNIST = (str(Path(sysconfig.get_path("scripts"), "dmnist")),)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LAUNCH = (sys.executable, "-m", "torch.distributed.launch")
SECRET = "the secret of a test"
PATIENCE = 120.0
"""Seconds after which something that should have ended hangs. Generous: nothing is measured by it."""

_LAUNCHERS = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME"
    r"|(MASTER|TORCHELASTIC|SLURM|PMI|PMIX|OMPI|MPI|MPICH|HYDRA)_?\w*"
    r"|FORCE_COLOR|NO_COLOR|TTY_\w+|COLUMNS|OMP_NUM_THREADS"
)


def environment(**more: str) -> dict[str, str]:
    """This process's variables without any launcher's, with a secret, and with `more`.

    PYTHONSAFEPATH is set as soon as a test imports the command line (see `common.import_path`).
    """
    kept = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
    return {**kept, "DMNIST_SECRET": SECRET, "PYTHONSAFEPATH": "", **more}


@dataclass(frozen=True)
class Finished:
    """What a program left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        assert self.code == 0, self
        assert self.stdout.count("\n") == 1, self
        return json.loads(self.stdout)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. They are below those that the system gives to sockets by itself, so
    that no socket takes one before the program that is told to use it."""
    found: list[int] = []
    tried = iter(random.SystemRandom().sample(range(20_000, 29_000), 1_000))
    while len(found) < count:
        port = next(tried)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
    return found


def free_port() -> int:
    """A port that nobody listens on, for launchers that insist on being told one."""
    return free_ports(1)[0]


# ---- Ranks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: with a value, with an error (its traceback), or without a word."""

    value: Any = None
    error: str | None = None


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` in `size` processes of a group on CPU; their results, by rank.

    `function` is importable; arguments and results are plain values or NumPy arrays. Raises
    `AssertionError` with the traceback of every rank that failed.
    """
    outcomes = try_ranks(function, size, *arguments)
    wrong = [f"rank {rank} of {size}: {end.error}" for rank, end in enumerate(outcomes) if end.error]
    assert not wrong, "\n\n".join(wrong)
    return [end.value for end in outcomes]


def try_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Outcome]:
    """`run_ranks` for tests in which ranks fail: how each of them ended."""
    context = server()
    workers, readers = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for rank in range(size):
            placement = Placement(
                rank=rank,
                size=size,
                local_rank=rank,
                local_size=size,
                ports=(port,),
                launcher="test",
                secret=SECRET.encode(),
            )
            reader, writer = context.Pipe(duplex=False)
            own = listener if rank == 0 else None
            worker = context.Process(
                target=_rank, args=(writer, placement, own, function, arguments), daemon=True
            )
            worker.start()
            writer.close()
            workers.append(worker)
            readers.append(reader)
    deadline = time.monotonic() + PATIENCE
    try:
        return [_outcome(reader, deadline) for reader in readers]
    finally:
        for worker in workers:
            worker.kill()  # those that hang; the others have ended, or are about to
            worker.join()


def _outcome(reader: connection.Connection, deadline: float) -> Outcome:
    with reader:
        if not reader.poll(max(0.0, deadline - time.monotonic())):
            return Outcome(error=f"still running after {PATIENCE} seconds")
        try:
            return reader.recv()
        except EOFError:
            return Outcome(error="died without a word")


def _rank(
    writer: connection.Connection,
    placement: Placement,
    listener: socket.socket | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from distributed_mnist.distributed.world import World

    torch.set_num_threads(1)
    try:
        world = World.connect(placement, device=torch.device("cpu"), listener=listener)
        value = function(world, *arguments)
        world.barrier()  # nobody leaves while another still speaks
        world.close()
        writer.send(Outcome(value))
    except Exception:
        writer.send(Outcome(error=traceback.format_exc()))
    writer.close()
    os._exit(0)  # without finalisers, which could wait for a peer that is gone


def server() -> Any:
    """The multiprocessing context of a server that has imported what every rank needs, once a session.

    The program's own launcher forks its workers from the same server when it runs in this process, and
    wants them born with its signals blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where it finds it
        fork_server.start_server()
    return context


# ---- The command, warm -----------------------------------------------------------------------------------


def train(*arguments: object, nproc: int, out: Path) -> dict[str, Any]:
    """`dmnist train --nproc N --out OUT ...` on CPU, which must succeed; its result as stored."""
    words = ["train", "--device", "cpu", *map(str, arguments), "--nproc", str(nproc), "--out", str(out)]
    server()
    with pytest.raises(SystemExit) as end:
        main.main(words)
    assert end.value.code == 0, "see what was printed"
    return json.loads((out / "result.json").read_text())


def dmnist(*arguments: object, **variables: str) -> Finished:
    """`dmnist ...` in one process, with these environment variables added."""
    return dmnist_ranks([variables], *arguments)[0]


def dmnist_ranks(ranks: Sequence[Mapping[str, str]], *arguments: object) -> list[Finished]:
    """`dmnist ...` once for each of these environments at the same time, as a launcher of others would."""
    with contextlib.ExitStack() as running:
        programs = [
            running.enter_context(WarmProgram((*DMNIST, *arguments), cwd=None, **variables))
            for variables in ranks
        ]
        return [program.finish() for program in programs]


# ---- The program, fresh ----------------------------------------------------------------------------------


class Program:
    """A command under way in a session of its own; leaving the `with` block ends what is left of it."""

    def __init__(self, command: Sequence[object], *, cwd: Path | None = None, **variables: str) -> None:
        self.command = [str(word) for word in command]
        self._process = self._start(cwd, environment(**variables))
        self.pid = self._process.pid

    def _start(self, cwd: Path | None, variables: dict[str, str]) -> "subprocess.Popen[str] | _Forked":
        return subprocess.Popen(
            self.command,
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the program, or to it and all its children."""
        (os.killpg if group else os.kill)(self.pid, number)

    def running(self) -> bool:
        """Whether the program itself, not its children, is alive."""
        return self._process.poll() is None

    def finish(self) -> Finished:
        """Wait for it and for every child that holds its output."""
        try:
            stdout, stderr = self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as late:
            stdout, stderr = late.stdout, late.stderr
            self.signal(signal.SIGKILL, group=True)
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # who is in another session may hold the pipe
                stdout, stderr = self._process.communicate(timeout=5)
            pytest.fail(f"still running after {PATIENCE} seconds: {self.command}\n{stdout}\n{stderr}")
        return Finished(self._process.returncode, stdout, stderr)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until `condition()` is true, and return it; the program must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if not self.running() or time.monotonic() > deadline:
                pytest.fail(f"{what} never came: {self.command}\n{self.finish()}")
            time.sleep(0.05)  # looking costs time that the program needs
        return value


def run(command: Sequence[object], *, cwd: Path | None = None, **variables: str) -> Finished:
    """Run a fresh program to its end."""
    with Program(command, cwd=cwd, **variables) as program:
        return program.finish()


# ---- The program, warm -----------------------------------------------------------------------------------


class WarmProgram(Program):
    """`Program((*DMNIST, ...))` without the second of imports of each process that it starts.

    The launcher is forked from the warm server. Where it would start an interpreter as its fork server, it
    forks itself. Signals, sessions, parents, pids and output are those of the fresh program. `before` is
    called in the launcher before anything else.
    """

    def __init__(
        self,
        command: Sequence[object],
        before: Callable[[], None] | None = None,
        /,
        *,
        cwd: Path | None = None,
        **variables: str,
    ) -> None:
        self._before = before
        super().__init__(command, cwd=cwd, **variables)

    def _start(self, cwd: Path | None, variables: dict[str, str]) -> "subprocess.Popen[str] | _Forked":
        function, words = self._main()
        return _Forked(function, words, cwd or Path.cwd(), variables, self._before)

    def _main(self) -> tuple[Callable[[list[str]], None], list[str]]:
        """What to call with which words: `dmnist` and arguments, or the path of a script and arguments."""
        if self.command[0].endswith(".py"):
            return run_script, self.command
        assert self.command[0] == DMNIST[0]
        return _launch, self.command[1:]


class _Forked:
    """What `Program` needs of `subprocess.Popen`, for a function in a fork of the warm server."""

    def __init__(
        self,
        function: Callable[[list[str]], None],
        words: list[str],
        cwd: Path,
        variables: dict[str, str],
        before: Callable[[], None] | None,
    ) -> None:
        context = server()
        readers, writers = zip(*[context.Pipe(duplex=False) for _ in range(3)], strict=True)
        arguments = (writers, function, words, cwd, variables, before)
        self._process = context.Process(target=_become_program, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid
        for writer in writers:
            writer.close()
        *outputs, ready = readers
        self._text = ["", ""]
        self._threads = [
            threading.Thread(target=self._read, args=(number, reader), daemon=True)
            for number, reader in enumerate(outputs)
        ]
        for thread in self._threads:
            thread.start()
        ready.poll(PATIENCE)  # until it is closed

    def _read(self, number: int, reader: connection.Connection) -> None:
        with reader, os.fdopen(os.dup(reader.fileno())) as file:
            for line in file:
                self._text[number] += line

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> Any:  # as in Popen
        return self._process.exitcode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait until it has ended and all that hold its output have."""
        deadline = time.monotonic() + timeout
        for waited in (*self._threads, self._process):
            waited.join(max(0.0, deadline - time.monotonic()))
        stdout, stderr = self._text
        if self.poll() is None or any(thread.is_alive() for thread in self._threads):
            late = subprocess.TimeoutExpired("dmnist", timeout)
            late.stdout, late.stderr = stdout, stderr  # type: ignore[assignment]
            raise late
        return stdout, stderr


def _become_program(
    writers: Sequence[connection.Connection],
    function: Callable[[list[str]], None],
    words: list[str],
    cwd: Path,
    variables: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    for descriptor, writer in enumerate(writers[:2], start=1):
        os.dup2(writer.fileno(), descriptor)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    if before is not None:
        before()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, spawn.SIGNALS)  # which the server is deaf to
    for writer in writers:
        writer.close()  # the last one tells the test that this process can be signalled
    function(words)


def _launch(words: list[str]) -> None:
    util.spawnv_passfds = _fork_server
    main.main(words)


def run_script(words: list[str]) -> None:
    """Run `python SCRIPT WORDS...` in this process."""
    util.spawnv_passfds = _fork_server
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _fork_server(_: object, command: list[str | bytes], descriptors: Sequence[int]) -> int:
    """Instead of a fresh interpreter for multiprocessing's fork server: this process, forked.

    `command` ends with the text of a call of `forkserver.main`, with the descriptors as numbers.
    """
    if pid := os.fork():
        return pid
    try:
        gc.freeze()  # no object may close a descriptor that is closed below and then used by another
        forkserver._forkserver._lock = threading.Lock()  # type: ignore[attr-defined]
        kept = sorted({0, 1, 2, *descriptors})
        for low, high in itertools.pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
            os.closerange(low + 1, high)
        exec(command[-1], {})
    finally:
        os._exit(0)


# ---- What a program shows of itself ----------------------------------------------------------------------


def events(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's `metrics.jsonl`; none where there is no such file yet."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(out: Path) -> int:
    """The last step that a run has recorded."""
    return max((event["step"] for event in events(out) if event["event"] == "steps"), default=0)


def processes(group: int) -> dict[int, int]:
    """Living processes of a process group: pid to parent's pid. Needs `/proc`."""
    found = {}
    for pid, state, parent, its_group in _processes():
        if its_group == group and state not in "ZX":
            found[pid] = parent
    return found


def _processes() -> Iterator[tuple[int, str, int, int]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            yield int(folder.name), state, int(parent), int(group)
