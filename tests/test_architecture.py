"""What keeps the project readable, as tests: who imports whom, what an import does, how long files are."""

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distributed_mnist"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# A module imports only from those before it. `docs/architecture.md` draws the same order.
ORDER: Sequence[str] = """
    placement errors nearest installed keys aside layout environment
    config digest
    idx catalog locate decode download strokes generated datasets arrays
    rendezvous roll_call meeting vitals watch mesh torch_group world devices signals
    launch child endings spawn
    augment batches patches crops models optimizers averaging muon optim
    loss shardwise company costs tree topology gradients ledger evaluate mistakes pace
    original distrust checkpoint store lock
    console observe record waiting terminal confusion charts history report_data report tensorboard_sink
    progress supply share
    train
    process folder prepare job vote trained assess ensemble
    exported export_onnx export_torch export_weights export_check
    compare board known trial ordeal faults chaos witness verify
    baseline bench_runs bench_exchange bench_plot bench_sections bench
    complaints flags flags_use flags_data grammar
    report_command follow export picture predict
    findings probe_host probe_world doctor
    data_commands workers
    classic classic_job
    in_processes in_python preload cli __main__ __init__
""".split()  # noqa: SIM905 - one line a layer


def imports_of(module: str) -> dict[str, list[str]]:
    """Module path to names imported from it, wherever in the file the import stands."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found.setdefault(source, []).extend(alias.name for alias in node.names)
    return found


def own_imports(module: str) -> set[str]:
    own: set[str] = set()
    for source, names in imports_of(module).items():
        if source in (".", "distributed_mnist"):
            own.update(names)
        elif source.startswith((".", "distributed_mnist.")):
            own.add(source.removeprefix("distributed_mnist").lstrip("."))
    return own


def uses(module: str, attribute: str, owner: str) -> bool:
    """Whether a module's code has `owner.attribute`."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(tree)
    )


def test_every_module_has_a_place_in_the_order():
    assert sorted(ORDER) == MODULES


def test_the_document_draws_the_same_order():
    table = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str):
    # Type annotations and the late imports of files that start before torch count like any other.
    later = {name for name in own_imports(module) if ORDER.index(name) >= ORDER.index(module)}
    assert not later, f"{module} imports {later}, which come after it"


def test_the_loop_knows_neither_launchers_nor_the_command_line():
    reached, waiting = set(), ["train"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += own_imports(module) - reached
    assert not reached & {"cli", "launch", "spawn", "classic", "job"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_world_speaks_to_other_processes(module: str):
    distributed = any(
        source.startswith("torch.distributed") or (source == "torch" and "distributed" in names)
        for source, names in imports_of(module).items()
    )
    wrapper = any(source.startswith("torch.nn.parallel") for source in imports_of(module))
    # The last is what others write.
    assert distributed == (module in ("meeting", "torch_group", "baseline"))
    assert wrapper == (module in ("gradients", "baseline"))


@pytest.mark.parametrize("module", MODULES)
def test_only_two_files_touch_the_environment(module: str):
    touches = uses(module, "environ", "os") or uses(module, "getenv", "os")
    assert touches == (module in ("launch", "environment"))  # the one reads, the other sets


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_to_read(module: str):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 300


@pytest.mark.parametrize("module", ["cli", "grammar", "classic", "launch", "spawn", "config"])
def test_starts_before_torch(module: str):
    code = f"import sys, distributed_mnist.{module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
