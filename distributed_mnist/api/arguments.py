"""Check what a caller passes to the API, and word errors for Python: `nproc`, not `--nproc`."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..config import Recipe, Run
from ..data.arrays import checked
from ..data.catalog import NAMES, require_name
from ..data.datasets import Dataset
from ..errors import DmnistError, UsageError

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


def resolve_dataset(dataset: Any, data: Any) -> tuple[Dataset | None, str, Path]:
    """Return the data set if it is already in memory, otherwise None; its name; and where to load it from.

    Raises `DataError` for a `Dataset` that cannot be used, and `UsageError` for anything but a data set.
    """
    folder = as_path("data", data)
    if isinstance(dataset, Dataset):
        return checked(dataset), "idx", folder
    if not isinstance(dataset, str | os.PathLike):
        raise UsageError(
            "dataset must be a name such as 'mnist', a folder with four IDX files, or the result of "
            f"from_arrays, which takes arrays or tensors; not {_kind(dataset)}"
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
