"""`here("train", ...)` runs `dmnist train ...` in the test's own process; only its workers are others."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
from ranks import Finished

from distributed_mnist.cli import main
from distributed_mnist.launcher import spawn, worker


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
        patch.setattr(spawn, "run_worker", functools.partial(_work_into, files))
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


def _work_into(files: Sequence[Path], *arguments: Any) -> None:
    for descriptor, path in enumerate(files, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    worker.run_worker(*arguments)
