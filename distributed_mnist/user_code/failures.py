"""Tell the failures of a user's model from those of this program."""

import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ..common.printable import printable
from ..errors import DmnistError, LaunchError, UsageError, explain

_PACKAGE = f"{__name__.partition('.')[0]}."
_CALLS_MODELS = ("torch.nn.", "torch.autograd", "torch._tensor")
"""Modules of torch through which this program runs a model, forwards and backwards."""


@contextlib.contextmanager
def model_failures(name: str, tell: Callable[[str], str] = str) -> Iterator[None]:
    """Raise `UsageError` for an exception in the body that comes from the user's model called `name`.

    This includes `sys.exit` in the model. `tell(problem)` returns the message; it may add when this
    happened, and what to do. Expected errors, a lack of memory and defects of this program pass unchanged.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        expected = isinstance(error, DmnistError) or isinstance(explain(error), LaunchError)
        called = _frames_called(error)
        if expected or ":" not in name or not (called and _module(called[0][0]).startswith(_CALLS_MODELS)):
            raise
        told = UsageError(f"--model {name}: {tell(f'{type(error).__name__}: {error}{_place(called)}')}")
        told.on_one_rank = True
        raise told from error


def _frames_called(error: BaseException) -> list[tuple[FrameType, int]]:
    """Return the frames below the last one of this program in the traceback, each with its line."""
    frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    called = itertools.takewhile(lambda entry: not _module(entry[0]).startswith(_PACKAGE), frames)
    return list(called)[::-1]


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _place(called: list[tuple[FrameType, int]]) -> str:
    """Return the innermost line that is not torch's, in parentheses; empty if there is none."""
    own = [entry for entry in called if not _module(entry[0]).startswith("torch.")]
    if not own:
        return ""
    line = traceback.StackSummary.extract(iter(own[-1:]))[0]
    return printable(f" ({Path(line.filename).name}:{line.lineno}: {line.line})")
