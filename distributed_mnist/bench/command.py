"""Run `dmnist bench`: measure how fast this machine runs the program, as a user would see it.

Each measurement runs the program, or the loop it is compared with, in separate processes. Measurements to
compare alternate, so that a drift of the machine's speed has little effect on their ratio.
"""

import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ..common.atomic_write import written_aside
from ..common.placement import usable_cores
from ..config import load_recipe
from ..errors import OutputError, reason
from ..reporting.console import make_console, print_json
from .sections import ONLY_ON_GPUS, SECTIONS
from .session import Bench, Gpus, Plan, find_gpus


def run(*, sections: Sequence[str], out: Path | None, as_json: bool, **flags: Any) -> int:
    """Measure, show the results, and return the exit code. Raises `UsageError` for too many processes.

    `sections` are names of `SECTIONS`; empty for all of them. Raises `LaunchError` if this host lacks the
    device.
    """
    plan = Plan(**flags)
    recipe = load_recipe(plan.recipe)
    if plan.nproc is not None:
        recipe.check_size(plan.nproc)
    console = make_console(stderr=as_json)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dmnist-bench-")))
        bench = Bench(plan, console, folder, find_gpus(plan.device))
        bench.results["machine"] = machine(bench.gpus)
        console.print(", ".join(bench.results["machine"].values()))
        for name in sections or [name for name in SECTIONS if bench.gpus or name not in ONLY_ON_GPUS]:
            bench.measure(name, SECTIONS[name])
        if out is not None:
            save(bench.results, out, console)
    if as_json:
        print_json(bench.results)
    return 0


def machine(gpus: Gpus | None) -> dict[str, str]:
    """Describe the machine, with the GPUs that are measured."""
    return {
        **({"gpus": f"{gpus.count} × {gpus.name}"} if gpus else {}),  # noqa: RUF001
        "processor": platform.processor() or platform.machine(),
        "cores": f"{usable_cores()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {version('torch')}",
    }


def save(results: dict[str, Any], out: Path, console: Console) -> None:
    """Write `bench.json` and `bench.svg`. Raises `OutputError`."""
    from . import plot  # noqa: PLC0415 - imports matplotlib

    try:
        with written_aside(out / "bench.json") as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        with written_aside(out / "bench.svg") as path:
            plot.draw(results, path)
    except OSError as error:
        raise OutputError(f"--out {out}: {reason(error)}") from None
    console.print(f"\nin {out}: bench.json, bench.svg")
