"""Check what a caller passes to the API, and word errors for Python: `nproc`, not `--nproc`."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ..common.suggest import did_you_mean
from ..config import Recipe, Run
from ..data.arrays import checked
from ..data.catalog import NAMES, require_name
from ..data.datasets import Dataset
from ..errors import DmnistError, UsageError
from ..runs.run_files import find_recipe
from .torch_datasets import is_torch, read_pair

P = ParamSpec("P")
R = TypeVar("R")
RUN_FIELDS = {field.name for field in dataclasses.fields(Run)}
RECIPE_FIELDS = {field.name for field in dataclasses.fields(Recipe)}
_RESUME = re.compile(r"--resume auto --out ([^\s;]+)")
_FLAG = re.compile(
    r"--([a-z][a-z-]*)(?:[ =]([A-Z]+|[\w.]+:[\w.<>]+|auto|generated|idx|mnist|\d+(?:\.\d+)?)(?![\w.]))?"
)


def speaks_python(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise the same errors as the command, but with the names of its own arguments."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except DmnistError as error:
            text = in_python(str(error))
            if text == str(error):
                raise
            raise type(error)(text) from error

    return call


def in_python(text: str) -> str:
    """Return a message with `name=value` in place of `--name value`, for settings that `train` has."""

    def reworded(match: re.Match[str]) -> str:
        name, value = match[1].replace("-", "_"), match[2]
        if name not in RUN_FIELDS | RECIPE_FIELDS | {"recipe"}:
            return match[0]
        if value is None:
            return name
        return (
            f"{name}=..." if value.isupper() else f"{name}={value if value[0].isdigit() else repr(value)}"
        )

    return _FLAG.sub(reworded, _RESUME.sub(lambda match: f"resume='auto', out={match[1]!r}", text))


def as_path(name: str, value: Any) -> Path:
    """Return the argument `name` as a path, with the home folder in place of `~`. Raises `UsageError`."""
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name} must be a path, not {_kind(value)}")
    return Path(os.path.expanduser(value))  # noqa: PTH111 - does not fail for `~` of an unknown user


_FUNCTIONS = {
    "model": "a function of the number of classes",
    "loss": "a function of logits and labels",
    "optimizer": "a function of parameters and lr",
}
"""What may be a user's own function, and of what."""


def names_and_functions(**given: Any) -> tuple[dict[str, str], dict[str, Callable[..., Any]]]:
    """Return the names of those of `_FUNCTIONS` that the user passed, and the functions by name.

    Raises `UsageError` for what is neither a name nor a function.
    """
    names: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    for argument, value in given.items():
        if isinstance(value, str):
            names[argument] = value
        elif callable(value):
            name = getattr(value, "__qualname__", type(value).__qualname__)
            name = f"{getattr(value, '__module__', None) or '__main__'}:{name}"
            # Two may have the same name, such as `<lambda>`.
            names[argument] = name if functions.get(name, value) is value else f"{name}.{argument}"
            functions[names[argument]] = value
        elif value is not None:
            raise UsageError(f"{argument} must be a name or {_FUNCTIONS[argument]}, not {_kind(value)}")
    return names, functions


def python_number(value: Any) -> Any:
    """Convert a NumPy number, as from a loop over `np.linspace`, to a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def override_recipe(
    recipe: str | Recipe, settings: dict[str, Any], names: dict[str, str]
) -> tuple[Recipe, str]:
    """Return the recipe with the user's settings applied, and its name for display. Raises `UsageError`."""
    known = RECIPE_FIELDS | RUN_FIELDS
    for name in settings:
        if name not in known:
            raise UsageError(f"there is no setting {name!r}{did_you_mean(name, sorted(known))}")
    if not isinstance(recipe, str | Path | Recipe):
        raise UsageError(
            f"recipe must be a name, a TOML file, a run's folder or a Recipe, not {recipe!r:.80}"
        )
    title = "recipe" if isinstance(recipe, Recipe) else str(recipe)
    base = recipe if isinstance(recipe, Recipe) else find_recipe(str(as_path("recipe", title)), **names)
    changes = {key: value for key, value in settings.items() if key in RECIPE_FIELDS}
    return Recipe.from_dict(base.to_dict() | changes | names, "settings"), title


def resolve_dataset(
    dataset: Any, data: Any, *, test_only: bool = False
) -> tuple[Dataset | None, str, Path]:
    """Return the data set if it is already in memory, otherwise None; its name; and where to load it from.

    With `test_only`, only the test images will be used, so one torch `Dataset` is enough. Raises
    `DataError` for a `Dataset` that cannot be used, and `UsageError` for anything but a data set.
    """
    folder = as_path("data", data)
    if isinstance(dataset, Dataset):
        return checked(dataset), "idx", folder
    if is_torch(dataset):
        return read_pair(dataset, test_only=test_only), "idx", folder
    if not isinstance(dataset, str | os.PathLike):
        raise UsageError(
            "dataset must be a name such as 'mnist', a folder with four IDX files, a pair of torch "
            f"Datasets, or the result of from_arrays, which takes arrays or tensors; not {_kind(dataset)}"
        )
    path = as_path("dataset", dataset)
    if isinstance(dataset, str) and (dataset in NAMES or not path.is_dir()):
        require_name(dataset)
        return None, dataset, folder
    return None, "idx", path


def _kind(value: object) -> str:
    """Return what a value is, for a message."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
