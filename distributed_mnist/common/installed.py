"""Versions of installed packages, and the command that installs an extra."""

import importlib.metadata
import sys


def version(package: str) -> str:
    """Return a package's version; `not installed` if it has no metadata, as in a copy of the source."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def install(extra: str) -> str:
    """Return the command that installs one of this program's extras for this Python."""
    return f"{sys.executable} -m pip install 'distributed-mnist[{extra}]'"
