"""What lies where in a run's folder. Known before torch is imported: the launcher looks here too."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUNS = Path("runs")
"""Where runs go that were given no folder."""
_MEMBER = re.compile(r"seed-(\d+)")
_NAME = re.compile(r"step_(\d+)\.pt")


def config_in(out: Path) -> dict[str, Any] | None:
    """`config.json` of the run in `out`, of an ensemble that of its first network; None without one."""
    try:
        told = json.loads([*members_in(out), out][0].joinpath("config.json").read_text())
        return {"recipe": dict(told["recipe"]), "run": dict(told["run"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def new_folder(title: str) -> Path:
    """A name under `runs/` that nobody has yet; `title` is the recipe's."""
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{Path(title).stem}"
    names = [stamp, *(f"{stamp}-{again}" for again in range(2, 100))]
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def resume_flags(out: Path, ensemble: int = 1) -> str:
    """The flags with which a person goes on with the run, or the ensemble of so many, in `out`."""
    if ensemble == 1 and _MEMBER.fullmatch(out.name) and not (out.parent / "metrics.jsonl").exists():
        return f"--resume auto --out {out.parent} --ensemble N"  # how many, that folder does not tell
    return f"--resume auto --out {out}" + (f" --ensemble {ensemble}" if ensemble > 1 else "")


def member_folder(out: Path, seed: int) -> Path:
    """Where, in the folder of an ensemble, the network of this seed is trained."""
    return out / f"seed-{seed}"


def members_in(out: Path) -> list[Path]:
    """The folders of an ensemble's networks, by seed."""
    found = [
        (int(match[1]), path) for path in out.glob("seed-*") if (match := _MEMBER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return folder / f"step_{step:08d}.pt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first; without `best.pt`."""
    try:
        return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)
    except OSError:
        return []


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step_"))


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of the run in `folder`, sound or not; -1 if there is none."""
    found = checkpoints_in(folder / "checkpoints")
    return step_of(found[-1]) if found else -1
