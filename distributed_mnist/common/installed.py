"""What is installed, and how to install what is not."""

import importlib.metadata
import sys


def version(package: str) -> str:
    """As its own metadata tell; `not installed` where there are none, as in a copy of the source alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def install(extra: str) -> str:
    """The command that installs one of our extras for this Python."""
    return f"{sys.executable} -m pip install 'distributed-mnist[{extra}]'"
