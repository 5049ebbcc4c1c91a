"""Name, find and write the files in a run's folder.

This module does not import torch, because the launcher uses it before torch is imported.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

from ..common.atomic_write import written_aside
from ..errors import OutputError, reason

RUNS = Path("runs")
"""The parent folder of runs without `--out`."""
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
FIRST_FILES = (".group", "config.json", "metrics.jsonl")
"""The files that a run writes before its first step."""
_MEMBER = re.compile(r"seed-(\d+)")
_CHECKPOINT = re.compile(r"step_(\d+)\.pt")
_ORIGINAL = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth\.tar")


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file completely or not at all. Raises `OutputError`."""
    try:
        with written_aside(path) as part:
            part.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: {reason(error)}") from None


def require_overwritable(path: Path, marker: bytes, name: str) -> None:
    """Raise `OutputError` if there is a file at `path` without `marker`: it is not an earlier `name`."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a device may never end
            raise OutputError(f"{path} cannot be written: it is not a file")
        is_ours = marker in path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}") from None
    if not is_ours:
        raise OutputError(
            f"{path} exists and is not an earlier {name}: choose another file with --out, or remove it"
        )


def new_folder(title: str) -> Path:
    """Return an unused path under `runs/`, named after the time and `title`, the name of the recipe."""
    path = Path(title)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem  # a run's recipe
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
    names = [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def resume_flags(out: Path, ensemble: int = 1) -> str:
    """Return the flags that resume the run in `out`, or the ensemble in `out` with `ensemble` members."""
    if ensemble == 1 and _MEMBER.fullmatch(out.name) and not (out.parent / "metrics.jsonl").exists():
        return f"--resume auto --out {out.parent} --ensemble N"  # the number of members is unknown here
    return f"--resume auto --out {out}" + (f" --ensemble {ensemble}" if ensemble > 1 else "")


def member_folder(out: Path, seed: int) -> Path:
    """Return the folder of the member with this seed, inside the ensemble's folder `out`."""
    return out / f"seed-{seed}"


def members_in(out: Path) -> list[Path]:
    """Return the folders of an ensemble's members, sorted by seed."""
    members = [
        (int(match[1]), path) for path in out.glob("seed-*") if (match := _MEMBER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(members)]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint for `step` in a folder of checkpoints."""
    return folder / f"step_{step:08d}.pt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder of checkpoints, oldest step first, without `best.pt`."""
    try:
        return sorted((path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)), key=step_of)
    except OSError:
        return []


def original_checkpoints_in(folder: Path) -> list[Path]:
    """Return the original script's checkpoints in a folder, oldest first, without `model_best.pth.tar`.

    `checkpoint_3_50.pth.tar` is from within epoch 3, so it is older than `checkpoint_3.pth.tar`.
    """
    found: list[tuple[int, float, Path]] = []
    for path in folder.glob("checkpoint_*.pth.tar"):
        if match := _ORIGINAL.fullmatch(path.name):
            found.append((int(match[1]), float(match[2] or "inf"), path))
    return [path for _, _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's file name."""
    return int(checkpoint.stem.removeprefix("step_"))


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint (even a damaged one) of the run in `folder`; -1 if none."""
    checkpoints = checkpoints_in(folder / "checkpoints")
    return step_of(checkpoints[-1]) if checkpoints else -1
