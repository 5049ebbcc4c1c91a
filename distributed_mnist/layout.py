"""What lies where in a run's folder. Known before torch is imported: the launcher looks here too."""

import re
from datetime import UTC, datetime
from pathlib import Path

RUNS = Path("runs")
"""Where runs go that were given no folder."""
_NAME = re.compile(r"step_(\d+)\.pt")


def new_folder(title: str) -> Path:
    """A name under `runs/` that nobody has yet; `title` is the recipe's."""
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{Path(title).stem}"
    names = [stamp, *(f"{stamp}-{again}" for again in range(2, 100))]
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a folder of checkpoints."""
    return folder / f"step_{step:08d}.pt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first; without `best.pt`."""
    try:
        found = [
            (int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
        ]
    except OSError:
        return []
    return [path for _, path in sorted(found)]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of the run in `folder`, sound or not; -1 if there is none."""
    found = checkpoints_in(folder / "checkpoints")
    match = _NAME.fullmatch(found[-1].name) if found else None
    return int(match[1]) if match else -1
