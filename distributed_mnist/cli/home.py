"""Paths that begin with `~`."""

import os
import re
from collections.abc import Iterable

_PATH = re.compile(r"(--?[\w-]+=)?(~.*)", re.DOTALL)


def expand_home(arguments: Iterable[str]) -> list[str]:
    """Return command-line arguments with the home folder in place of `~`, also in `--out=~/run`.

    A shell does this only at the start of an argument, and a batch file or a container not at all.
    """
    matches = [(argument, _PATH.fullmatch(argument)) for argument in arguments]
    return [(m[1] or "") + os.path.expanduser(m[2]) if m else argument for argument, m in matches]  # noqa: PTH111
