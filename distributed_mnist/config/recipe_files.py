"""Load recipes: TOML files, of which the built-in ones are in `recipes/`.

A file may name another recipe as its `base`, and then only contains what is different.
"""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from ..common.regular_file import read_regular
from ..common.suggest import unknown
from ..errors import UsageError, reason
from .recipe import Recipe

_RECIPES = resources.files("distributed_mnist") / "recipes"
_MAX_BYTES = 1 << 20
_MAX_BASES = 8


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(Path(entry.name).stem for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Return the built-in recipe `name`, or the recipe in the TOML file `name`. Raises `UsageError`."""
    builtin, files = recipe_names(), dict[Path, dict[str, Any]]()
    while name not in builtin:
        path = Path(name)
        if path.suffix != ".toml":
            where = f"{[*files][-1]}: " if files else ""
            other = ", or give a .toml file" + ("" if files else " or a run's folder")
            raise UsageError(where + unknown("recipe", name, builtin, other))
        files[path] = values = _read(path)
        base = values.pop("base", None)
        if base is None:
            break
        if not isinstance(base, str):
            raise UsageError(f"{path}: base must be the name of a recipe or a .toml file, not {base!r:.80}")
        name = str(path.parent / base) if base.endswith(".toml") else base
        if Path(name).resolve() in {file.resolve() for file in files}:
            raise UsageError(f"{path}: its base {base} is based on {path} itself")
        if len(files) > _MAX_BASES:
            raise UsageError(f"{path}: it is the last of {_MAX_BASES} bases, but has a base of its own")
    recipe = Recipe()
    if name in builtin:
        values = tomllib.loads((_RECIPES / f"{name}.toml").read_text())
        recipe = Recipe.from_dict(values, f"recipe {name}")
    for path, values in reversed(files.items()):
        recipe = Recipe.from_dict(recipe.to_dict() | values, str(path))
    return recipe


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises `UsageError`."""
    try:
        return tomllib.loads(read_regular(path, _MAX_BYTES).decode())
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
