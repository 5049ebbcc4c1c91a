"""Read and write the JSON files of a run's folder.

Anything may have happened to a file since it was written, so nothing is used before it was checked against
its type in `schema`. This module does not import torch, because the command line uses it before torch is
imported.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..common.regular_file import read_regular
from ..config import Recipe, Run, flag, load_recipe, recipe_names
from ..errors import CheckpointError, UsageError, reason
from . import schema
from .layout import members_in, write_json

_MAX_BYTES = 64 << 20
_CONFIG_ADVICE = "delete it, and repeat all flags of the run to resume it"
_decoder = functools.cache(msgspec.json.Decoder)


@dataclass(frozen=True)
class Config:
    """The settings in `config.json`."""

    recipe: Recipe
    run: Run


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` with a digest of its content. Raises `OutputError`."""
    write_json(folder / "config.json", {**config, "content_sha256": _digest(config)})


def read_config(folder: Path, advice: str = _CONFIG_ADVICE) -> dict[str, Any] | None:
    """Return `config.json` of the run in `folder`; None if there is none. Raises `CheckpointError`."""
    path = folder / "config.json"
    config = _read(path, dict[str, Any], advice)
    if config is None:
        return None
    try:
        # A file whose field with the digest has a damaged name must not count as one without a digest.
        if unknown := config.keys() - set(schema.ConfigFields.__struct_fields__):
            raise ValueError(f"there is no field {reprlib.repr(min(unknown))}")
        msgspec.convert(config, schema.ConfigFields)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {advice}") from None
    claimed = config.pop("content_sha256", None)
    if claimed is not None and claimed != _digest(config):
        raise CheckpointError(f"{path} was damaged or changed (it does not match its digest): {advice}")
    return config


def config_in(out: Path, advice: str = _CONFIG_ADVICE) -> Config | None:
    """Return the settings of the run in `out`, or of an ensemble's first member; None if there are none.

    Raises `CheckpointError` for a damaged `config.json`.
    """
    folder = [*members_in(out), out][0]
    config = read_config(folder, advice)
    if config is None:
        return None
    try:
        known = {field.name: str(field.type) for field in dataclasses.fields(Run)}
        if "eval_every" in config["run"]:  # earlier versions counted it among the options
            config["recipe"]["eval_every"] = config["run"].pop("eval_every")
        if unknown := sorted(config["run"].keys() - known.keys()):
            raise UsageError(f"there is no setting {unknown[0]!r}")
        run: dict[str, Any] = {
            name: Path(value) if isinstance(value, str) and "Path" in known[name] else value
            for name, value in config["run"].items()
        }
        return Config(Recipe.from_dict(config["recipe"], "its recipe"), Run(**run))
    except UsageError as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged ({error}): {advice}") from None


def find_recipe(name: str, **own: str | None) -> Recipe:
    """Return a recipe: a built-in one, that in a TOML file, or that of the run in a folder.

    `name` may also be the path of the run's `config.json`. Only the user may choose code to import, not a
    run's file. So if the run's model, loss or optimizer is the user's own, its name must be in `own`, under
    that of the field. Raises `UsageError`, and `CheckpointError` for a damaged `config.json`.
    """
    path = Path(name)
    if name in recipe_names() or not (path.is_dir() or path.name == "config.json"):
        return load_recipe(name)
    folder = path if path.is_dir() else path.parent
    config = config_in(folder, "write its settings to a .toml file, or give them as flags")
    if config is None:
        raise UsageError(f"--recipe {name}: there is no run in {folder}, which has no config.json")
    for field, code in config.recipe.code().items():
        if own.get(field) is None:
            raise UsageError(
                f"--recipe {name}: the {field} is your own, so give it too: {flag(field)} {code}"
            )
    return config.recipe.replace(**{field: value for field, value in own.items() if value is not None})


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of the run in `folder`; None if there is none. Raises `CheckpointError`."""
    advice = "resume the run with --resume auto to write it again"
    return _read(folder / "result.json", schema.ResultFields, advice)


def read_score(folder: Path) -> dict[str, Any] | None:
    """Return the weights' digest and the accuracy in `result.json` of a run or an ensemble.

    Returns None if there is no such file. Raises `CheckpointError`.
    """
    return _read(folder / "result.json", schema.ScoreFields, "delete it to export without the accuracy")


def read_ensemble_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of an ensemble; None if there is none. Raises `CheckpointError`."""
    return _read(folder / "result.json", schema.EnsembleFields, "resume the ensemble to write it again")


def read_mistakes(folder: Path) -> dict[str, Any] | None:
    """Return `mistakes.json` of a run; None if there is none. Raises `CheckpointError`."""
    return _read(folder / "mistakes.json", schema.MistakesFields, "delete it; only the report uses it")


def read_group(folder: Path) -> dict[str, Any] | None:
    """Return `.group`; None if there is no valid file. Then the folder belongs to no known group."""
    with contextlib.suppress(CheckpointError):
        return _read(folder / ".group", schema.GroupFields, "delete it")
    return None


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line of `metrics.jsonl`; None if the line is damaged."""
    try:
        return _parse(line, schema.Event)
    except ValueError:
        return None


def _read(path: Path, kind: Any, advice: str) -> dict[str, Any] | None:
    """Return the fields that `kind` has of the JSON file at `path`; None if there is no file.

    Raises `CheckpointError`, which ends with `advice`, if it cannot be read or does not have this type.
    """
    try:
        data = read_regular(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}): {advice}") from None
    try:
        return _parse(data, kind)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {advice}") from None


def _parse(data: bytes, kind: Any) -> dict[str, Any]:
    """Return the fields that `kind` has of the JSON object in `data`.

    Raises `ValueError` if it does not have this type.
    """
    text = data.decode()
    try:
        # msgspec cannot decode half a surrogate pair, which stands for a byte of a path that is not UTF-8.
        half = r"\ud" in text
        value = msgspec.convert(json.loads(text), kind) if half else _decoder(kind).decode(text)
        return msgspec.to_builtins(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
