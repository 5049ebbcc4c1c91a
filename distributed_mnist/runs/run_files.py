"""Read and write the JSON files of a run's folder.

Anything may have happened to a file since it was written, so nothing is used before it was checked against
its type in `schema`. This module does not import torch, because the command line uses it before torch is
imported.
"""

import contextlib
import dataclasses
import hashlib
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Recipe, Run
from ..errors import CheckpointError, UsageError
from . import schema
from .checked_json import check_of, parse, read
from .layout import members_in, write_json

_CONFIG_ADVICE = "delete it, and repeat all flags of the run to resume it"
_FIELDS = {
    name: getattr(kind, "__origin__", kind).__annotations__.keys() for name, kind in schema.EVENTS.items()
}


@dataclass(frozen=True)
class Config:
    """The settings in `config.json`."""

    recipe: Recipe
    run: Run


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` with a digest of its content. Raises `OutputError`."""
    write_json(folder / "config.json", {**config, "content_sha256": _digest(config)})


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return `config.json` of the run in `folder`; None if there is none. Raises `CheckpointError`."""
    path = folder / "config.json"
    config = read(path, schema.ConfigFields, _CONFIG_ADVICE)
    if config is None:
        return None
    # If the name of the field with the digest is damaged, the file must not count as one without a digest.
    if unknown := sorted(config.keys() - schema.ConfigFields.__annotations__.keys()):
        shown = reprlib.repr(unknown[0])
        raise CheckpointError(f"{path} is damaged (there is no field {shown}): {_CONFIG_ADVICE}")
    claimed = config.pop("content_sha256", None)
    if claimed is not None and claimed != _digest(config):
        raise CheckpointError(
            f"{path} was damaged or changed (it does not match its digest): {_CONFIG_ADVICE}"
        )
    return config


def config_in(out: Path) -> Config | None:
    """Return the settings of the run in `out`, or of an ensemble's first member; None if there are none.

    Raises `CheckpointError` for a damaged `config.json`.
    """
    folder = [*members_in(out), out][0]
    config = read_config(folder)
    if config is None:
        return None
    try:
        known = {field.name: str(field.type) for field in dataclasses.fields(Run)}
        if unknown := sorted(config["run"].keys() - known.keys()):
            raise UsageError(f"there is no setting {unknown[0]!r}")
        run: dict[str, Any] = {
            name: Path(value) if isinstance(value, str) and "Path" in known[name] else value
            for name, value in config["run"].items()
        }
        return Config(Recipe.from_dict(config["recipe"], "its recipe"), Run(**run))
    except UsageError as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged ({error}): {_CONFIG_ADVICE}") from None


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of the run in `folder`; None if there is none. Raises `CheckpointError`."""
    return read(
        folder / "result.json", schema.Result, "resume the run with --resume auto to write it again"
    )


def read_score(folder: Path) -> dict[str, Any] | None:
    """Return the weights' digest and the accuracy in `result.json` of a run or an ensemble.

    Returns None if there is no such file. Raises `CheckpointError`.
    """
    return read(folder / "result.json", schema.ScoreFields, "delete it to export without the accuracy")


def read_ensemble_result(folder: Path) -> dict[str, Any] | None:
    """Return `result.json` of an ensemble; None if there is none. Raises `CheckpointError`."""
    return read(folder / "result.json", schema.EnsembleFields, "resume the ensemble to write it again")


def read_mistakes(folder: Path) -> dict[str, Any] | None:
    """Return `mistakes.json` of a run; None if there is none. Raises `CheckpointError`."""
    return read(folder / "mistakes.json", schema.MistakesFields, "delete it; only the report uses it")


def read_group(folder: Path) -> dict[str, Any] | None:
    """Return `.group`; None if there is no valid file. Then the folder belongs to no known group."""
    with contextlib.suppress(CheckpointError):
        return read(folder / ".group", schema.GroupFields, "delete it")
    return None


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event in a line of `metrics.jsonl`; None if the line is damaged."""
    try:
        event = parse(line, schema.EventFields)
        kind = event["event"]
        check_of(schema.EVENTS[kind])(event)
    except (ValueError, KeyError):
        return None
    return {name: value for name, value in event.items() if name in _FIELDS[kind]}


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return "nested too deeply"
