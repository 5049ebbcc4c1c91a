"""Distributed training of digit classifiers whose weights depend on recipe, data and seed alone.

As a library: `from distributed_mnist import train, evaluate, load`; see docs/library.md.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrays import from_arrays
    from .config import Recipe
    from .datasets import Dataset
    from .errors import DmnistError
    from .evaluate import Evaluation
    from .in_python import Result, evaluate, load, train
    from .trained import Trained

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
    "Dataset": "datasets",
    "DmnistError": "errors",
    "Evaluation": "evaluate",
    "Recipe": "config",
    "Trained": "trained",
    "from_arrays": "arrays",
}


def __getattr__(name: str) -> Any:
    """What there is for Python, imported when it is asked for: importing the package stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'in_python')}", __name__), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # An imported submodule becomes an attribute of its package: `train` and `evaluate` would hide the
        # functions of those names. `from distributed_mnist.train import ...` still finds the modules.
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
