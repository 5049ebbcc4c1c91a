"""The scripts of docs/how-to/verify.md for Slurm, with stand-ins for `dmnist`, `scontrol` and `logger`."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from ranks import REPOSITORY

HEALTH_CHECK, PROLOG = re.findall(
    r"^```bash\n(.+?)^```", (REPOSITORY / "docs/how-to/verify.md").read_text(), re.DOTALL | re.MULTILINE
)
LINE = "rank 1 (n1, cpu): step 7: the input of layer 3 is wrong"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("scontrol", "logger"):
        stand_in(tmp_path / name, f'printf "%s\\n" "$@" >{tmp_path}/{name}.txt')
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return tmp_path


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(script: str, folder: Path, code: int) -> int:
    """Run a script in which `dmnist verify` ends with this code; return the script's."""
    stand_in(
        folder / "dmnist",
        f'[ "$*" = verify ] && printf "PASS or\\nFAIL  {LINE}\\nsome error\\n"; exit {code}',
    )
    for path in ("/opt/dmnist/bin", "/var/log"):
        script = script.replace(path, str(folder))
    variables = {**os.environ, "PATH": ""}  # Slurm sets none
    return subprocess.run(["/bin/bash", "-c", script], env=variables, check=False).returncode


def test_a_node_that_computes_wrongly_is_drained(folder: Path) -> None:
    assert run(HEALTH_CHECK, folder, 9) == 0
    words = (folder / "scontrol.txt").read_text().splitlines()
    assert words == ["update", "NodeName=n1", "State=DRAIN", f"Reason=dmnist verify: {LINE}"]
    assert not (folder / "logger.txt").exists()


@pytest.mark.parametrize("code", [0, 5, 8, 124])
def test_no_other_node_is_drained(folder: Path, code: int) -> None:
    assert run(HEALTH_CHECK, folder, code) == 0
    assert not (folder / "scontrol.txt").exists()
    assert (folder / "logger.txt").exists() == (code != 0)
    if code:
        assert f"verify ended with code {code}: some error" in (folder / "logger.txt").read_text()


@pytest.mark.parametrize("code", [0, 5, 9, 124])
def test_a_prolog_fails_only_if_an_answer_is_wrong(folder: Path, code: int) -> None:
    assert (run(PROLOG, folder, code) != 0) == (code == 9)
    assert LINE in (folder / "dmnist-verify.log").read_text()
    assert "scontrol" not in PROLOG, "a prolog must not call Slurm's commands"
