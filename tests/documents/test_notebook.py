"""The notebook runs from top to bottom, and its output is of the same kinds as the output stored in it."""

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


def output_kinds(path: Path) -> list[list[str]]:
    """Return the kinds of output of each code cell, such as `stdout` and `image/png`."""
    return [
        [name for output in cell["outputs"] for name in output.get("data", {output.get("name"): ""})]
        for cell in cells(path, "code")
    ]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    """Run the notebook with fewer images, epochs and runs.

    After a change, refresh its output: `jupyter execute --inplace docs/tutorial/tutorial.ipynb`.
    """
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `dev` is not installed")
    execute = Path(sys.executable).with_name("jupyter-execute")
    shorter = NOTEBOOK.read_text()
    for words, fewer in (
        ("train_size=6_000, test_size=1_000", "train_size=600, test_size=100"),
        ('model=\\"cnn-small\\", epochs=3', 'model=\\"mlp\\", epochs=1'),
        ("(1, 3, 10, 30, 100)", "(10,)"),
        # 60 steps, of which 5 are done when the process is killed
        (r"\"--epochs\", \"20\"", r"\"--epochs\", \"10\""),
        (r"\"--checkpoint-every\", \"50\"", r"\"--checkpoint-every\", \"5\""),
    ):
        assert shorter.count(words) == 1
        shorter = shorter.replace(words, fewer)
    (tmp_path / "shorter.ipynb").write_text(shorter)
    done = subprocess.run(
        [execute, "--output", tmp_path / "run.ipynb", tmp_path / "shorter.ipynb"],
        env=environment(HOME=str(tmp_path), IPYTHONDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert output_kinds(tmp_path / "run.ipynb") == output_kinds(NOTEBOOK)
    assert sum("image/png" in kinds for kinds in output_kinds(NOTEBOOK)) >= 5


def test_link_targets_exist() -> None:
    links = re.findall(
        r"\]\(([^)]+)\)", "".join("".join(cell["source"]) for cell in cells(NOTEBOOK, "markdown"))
    )
    assert len(links) >= 4
    assert all((NOTEBOOK.parent / link).exists() for link in links)
