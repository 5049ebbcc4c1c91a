"""The wheel, in an environment that has none of the checkout: it brings the command and all its files."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from ranks import REPOSITORY, environment

PACKAGE = REPOSITORY / "distributed_mnist"
# Modules by the distribution that brings them, where that is called otherwise.
DISTRIBUTIONS = {"PIL": "pillow", "markupsafe": "Jinja2", "urllib3": "requests"}
EXTRAS = {"onnx", "onnxruntime", "safetensors"}


def called(*words: object, cwd: Path) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and no other file gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(PACKAGE, copy / "distributed_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    called(sys.executable, "-m", "build", "--wheel", "--no-isolation", copy, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_installed_alone_it_trains(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)  # this environment's does, sooner
    home = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", home / "python")
    called(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(
        called(home / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    # The libraries, which take minutes to install, are those of this environment; ours is not among them.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    where = called(home / "python", "-c", "import distributed_mnist as d; print(d.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    assert called(home / "dmnist", "--version", cwd=tmp_path).startswith("dmnist 0.")
    data = ["--dataset", "generated", "--train-size", "512", "--test-size", "100", "--device", "cpu"]
    told = called(
        home / "dmnist", "train", "--recipe", "fast", "--steps", "2", "--out", "run", *data, cwd=tmp_path
    )
    assert "weights sha256" in told
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_wheel_has_every_file_and_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= names
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    known = {name.lower() for name in needed}
    for path in PACKAGE.glob("*.py"):
        for module in imported(path) - set(sys.stdlib_module_names) - EXTRAS:
            assert DISTRIBUTIONS.get(module, module).lower() in known, f"{path.name} imports {module}"


def imported(path: Path) -> set[str]:
    """The top-level packages of others that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found - {"distributed_mnist"}
