"""Where this program's processes look for modules: not in the current folder.

A file there that is named like a module, such as `queue.py`, would otherwise be imported in its place. The
folder may be shared, so this would also run other people's code. `user_code` imports from it what
`--model` names. This module imports only what Python itself has imported at its start.
"""

import os
import sys

_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120


def leave_out_current_folder() -> None:
    """Remove the current folder from the path of this process, and of the processes that it starts.

    `python -m distributed_mnist` puts it first, and so does an empty entry in PYTHONPATH. It stays if it is
    where this package was found, or if PYTHONPATH names it.
    """
    main = sys.modules["__main__"]
    if not sys.flags.safe_path and getattr(main.__spec__, "name", "").startswith("distributed_mnist"):
        _remove(sys.path[0])
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(named) > 1 and "" in named and _current_folder() not in named:
        _remove(_current_folder())
    os.environ.update(variables())


def variables() -> dict[str, str]:
    """Return environment variables for child processes: to import the same package from a safe path."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    standard_library = os.path.dirname(os.__file__)  # noqa: PTH120
    preceding = sys.path[: sys.path.index(standard_library)] if standard_library in sys.path else []
    if _PACKAGE_PARENT in preceding and _PACKAGE_PARENT not in entries:  # the program is not installed
        entries.insert(0, _PACKAGE_PARENT)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entries)}


def _remove(folder: str) -> None:
    if folder != _PACKAGE_PARENT:
        sys.path[:] = [entry for entry in sys.path if entry != folder]


def _current_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was deleted
        return ""
