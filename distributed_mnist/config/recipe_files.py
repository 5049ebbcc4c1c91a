"""Load recipes: TOML files, of which the built-in ones are in `recipes/`."""

import tomllib
from importlib import resources
from pathlib import Path

from ..common.suggest import unknown
from ..errors import UsageError, reason
from .recipe import Recipe

_RECIPES = resources.files("distributed_mnist") / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(Path(entry.name).stem for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Return the built-in recipe `name`, or the recipe in the TOML file `name`. Raises `UsageError`."""
    names = recipe_names()
    if name in names:
        return Recipe.from_dict(tomllib.loads((_RECIPES / f"{name}.toml").read_text()), f"recipe {name}")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(unknown("recipe", name, names, ", or give a .toml file"))
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
