"""Which version of a package is installed."""

import importlib.metadata


def version(package: str) -> str:
    """As its own metadata tell; `not installed` where there are none, as in a copy of the source alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
