"""Distributed training of digit classifiers whose weights depend on recipe, data and seed alone.

From Python: `from distributed_mnist import train, evaluate, load`; see docs/how-to/library.md.
"""

import importlib
import sys

if sys.platform == "win32":
    raise ImportError("dmnist does not run on Windows: use Linux in WSL 2, the Windows Subsystem for Linux")

TYPE_CHECKING = False  # from typing, which must not be imported before `common.import_path` is applied
if TYPE_CHECKING:
    from .api.functions import Result, evaluate, load, train
    from .config import Recipe
    from .data.arrays import from_arrays
    from .data.datasets import Dataset
    from .errors import DmnistError
    from .inference.trained import Trained
    from .training.evaluate import Evaluation

__all__ = [
    "Dataset",
    "DmnistError",
    "Evaluation",
    "Recipe",
    "Result",
    "Trained",
    "evaluate",
    "from_arrays",
    "load",
    "train",
]
_MODULES = {
    "Dataset": "data.datasets",
    "DmnistError": "errors",
    "Evaluation": "training.evaluate",
    "Recipe": "config",
    "Trained": "inference.trained",
    "from_arrays": "data.arrays",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that importing the package stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'api.functions')}", __name__), name)
