"""The notebook runs from top to bottom, and shows what is kept of it in the project."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import REPOSITORY, environment

NOTEBOOK = REPOSITORY / "docs" / "tutorial" / "tutorial.ipynb"


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def shown(path: Path) -> list[list[str]]:
    """What each cell of code puts out, by kind: `stdout`, `image/png` and the like."""
    return [
        [name for output in cell["outputs"] for name in output.get("data", {output.get("name"): ""})]
        for cell in cells(path, "code")
    ]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    """To show it anew after a change: `jupyter execute --inplace docs/tutorial/tutorial.ipynb`."""
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `dev` is not installed")
    execute = Path(sys.executable).with_name("jupyter-execute")
    done = subprocess.run(
        [execute, "--output", tmp_path / "run.ipynb", NOTEBOOK],
        env=environment(HOME=str(tmp_path), IPYTHONDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shown(tmp_path / "run.ipynb") == shown(NOTEBOOK)
    assert sum("image/png" in kinds for kinds in shown(NOTEBOOK)) >= 5


def test_its_links_lead_somewhere() -> None:
    links = re.findall(
        r"\]\(([^)]+)\)", "".join("".join(cell["source"]) for cell in cells(NOTEBOOK, "markdown"))
    )
    assert len(links) >= 4
    assert all((NOTEBOOK.parent / link).exists() for link in links)
