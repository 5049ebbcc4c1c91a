"""`dmnist ...` without a fresh program, which would import torch anew. `ranks` has the fresh ones.

- `here(...)` is `ranks.dmnist(...)` in this process; only its workers are others.
- `Warm(...)` is a `ranks.Program` forked from the warm server: one rank, as other launchers start it.
"""

import contextlib
import functools
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
import ranks
from ranks import PATIENCE, Finished, Program

from distributed_mnist.cli import main
from distributed_mnist.launcher import spawn


def here(*arguments: object, **variables: str) -> Finished:
    """`dmnist ...` in this process if it may, or else in another with these environment variables added."""
    if variables or arguments[:1] in [("evaluate",), ("doctor",)]:  # they install signal handlers for good
        return ranks.dmnist(*arguments, **variables)
    ranks.server()
    folder = Path(tempfile.mkdtemp(prefix="dmnist-test-"))
    files = (folder / "out", folder / "err")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(spawn, "run_worker", functools.partial(ranks._work_into, files))
        out, err = (stack.enter_context(path.open("a")) for path in files)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main.main([str(word) for word in arguments])
        out.flush()
        err.flush()
        assert isinstance(end.value.code, int)
        return Finished(end.value.code, *(path.read_text() for path in files))


class Warm(Program):
    """A command in one process of the warm server; leaving the `with` block ends it.

    The words are those after `dmnist`, or the path of a script and its arguments. `stdout` takes the
    standard output, which `finish` then does not return.
    """

    def __init__(
        self, words: Sequence[object], *, cwd: Path, stdout: Path | None = None, **variables: str
    ) -> None:
        self.command = [str(word) for word in words]
        self._folder = Path(tempfile.mkdtemp(prefix="dmnist-test-"))
        files = (stdout or self._folder / "out", self._folder / "err")
        context = ranks.server()
        address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
        self._process = context.Process(
            target=_start, args=(cwd, files, ranks.environment(**variables), self.command, address)
        )
        self._process.start()
        self.pid = self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, which has no children."""
        os.kill(self.pid, number)

    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_alive()

    def finish(self) -> Finished:
        """Wait for it."""
        self._process.join(PATIENCE)
        hangs = self.running()
        if hangs:
            self.signal(signal.SIGKILL)
            self._process.join()
        ended = Finished(self._process.exitcode, *(_text(self._folder / name) for name in ("out", "err")))
        if hangs:
            pytest.fail(f"still running after {PATIENCE} seconds: {self.command}\n{ended}")
        return ended


def _text(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):  # it was killed before it began
        return path.read_text()
    return ""


def _start(
    folder: Path, files: tuple[Path, Path], variables: dict[str, str], words: list[str], address: str
) -> None:
    os.chdir(folder)
    if words[0].endswith(".py"):
        main.main = _run_script  # type: ignore[assignment] - which `_command` calls in the end
    ranks._command(files, variables, words, address)


def _run_script(words: list[str]) -> None:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
