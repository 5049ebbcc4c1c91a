"""Files in the current folder that are named like modules: never imported, except for what a user names."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest
from ranks import REPOSITORY, run

from distributed_mnist.common import import_path
from distributed_mnist.models.factory import find_factory

# Without the modules that Python imports at its start: they are imported before this program runs.
MODULES = """
    argparse array ast asyncio base64 bisect calendar csv ctypes dataclasses datetime decimal email
    fractions hashlib heapq hmac http inspect json logging lzma mmap multiprocessing numbers pickle
    platform pkgutil queue random secrets select selectors shutil signal socket ssl statistics string
    struct subprocess tempfile textwrap threading timeit token tokenize tomllib traceback typing uuid
    zipfile torch numpy scipy PIL rich tyro msgspec psutil requests jinja2 matplotlib tensorboard triton
"""
MODEL = """
import beside  # another module of the user's

def network(classes):
    import beside_too
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in MODULES.split():
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name} of the current folder')")
    for name, text in (("own_model", MODEL), ("beside", ""), ("beside_too", "")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_program(folder: Path) -> None:
    """With `-m` and an empty entry in PYTHONPATH: both put the folder in front of everything else."""
    data = ("--dataset", "generated", "--train-size", 64, "--test-size", 16, "--epochs", 1)
    train = ("train", *data, "--recipe", "classic", "--model", "own_model:network", "--nproc", 2)
    command = (sys.executable, "-m", "distributed_mnist", *train, "--out", folder / "run")
    done = run(command, cwd=folder, PYTHONPATH=os.pathsep.join((str(REPOSITORY), "")))
    assert (done.code, done.stderr) == (0, "")


def test_a_model_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(folder))])
    before = list(sys.path)
    find_factory("own_model:network")
    assert sys.path == before
    with pytest.raises(Exception, match=r"platform is .*, not platform\.py: give your file another name"):
        find_factory("platform:network")


def test_children_import_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, library = str(REPOSITORY), sysconfig.get_path("stdlib")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", "/one", "")))
    monkeypatch.setattr(sys, "path", [library, parent])  # installed
    assert import_path.variables() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/one"}
    monkeypatch.setattr(sys, "path", [parent, library])  # in the folder of the script or of `python -m`
    assert import_path.variables()["PYTHONPATH"] == os.pathsep.join((parent, "/one"))
