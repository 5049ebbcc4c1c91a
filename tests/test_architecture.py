"""Rules for the source that import-linter (see pyproject.toml) cannot express."""

import ast
import subprocess
import sys
from collections.abc import Iterator

from ranks import REPOSITORY

PACKAGE = REPOSITORY / "distributed_mnist"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))


def imports(module: str) -> set[str]:
    """Every name that a module imports, with its source in front."""
    found: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def importers(source: str) -> set[str]:
    """The modules that import something from `source`."""
    return {
        module for module in MODULES if any(f"{name}.".startswith(f"{source}.") for name in imports(module))
    }


def test_only_these_modules_use_torch_distributed() -> None:
    # bench/baseline is the plain loop that others write.
    assert importers("torch.distributed") == {
        "bench/baseline",
        "distributed/process_group",
        "distributed/agent_store",
    }
    assert importers("torch.nn.parallel") == {"bench/baseline", "gradients/ddp"}


def test_only_these_modules_touch_the_environment() -> None:
    def touches(module: str) -> bool:
        return any(
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv")
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            for node in nodes(module)
        )

    # The first reads launchers' variables, the second sets libraries' own, the third Python's own.
    allowed = {"distributed/detect_launcher", "common/environment", "common/import_path"}
    assert set(filter(touches, MODULES)) == allowed


BEFORE_TORCH = (
    *("cli.main", "cli.parser", "cli.original_script", "distributed.detect_launcher"),
    *("launcher.spawn", "launcher.default_nproc", "data.prefetch", "config"),
)
IMPORT_IN_TURN = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("distributed_mnist." + name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""


def test_starts_before_torch() -> None:
    command = [sys.executable, "-c", IMPORT_IN_TURN, *BEFORE_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_exact_arithmetic_calls_no_function_whose_last_bit_depends_on_the_machine() -> None:
    """Functions of this program stand for these; elementary's own square root is the one exception.

    Python's `math.sqrt` and `math.ldexp` are exact everywhere."""
    inexact = (
        "addcdiv addcmul cos cross_entropy cumprod cumsum erf erfinv exp exp2 expm1 float_power "
        "gelu group_norm layer_norm ldexp lerp log log1p log2 log_softmax logsumexp mean norm pow "
        "rsqrt sigmoid silu sin softmax sqrt std tan tanh var"
    )
    found = {
        (module, node.func.attr)
        for module in MODULES
        if module.startswith("exact/")
        for node in nodes(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.removesuffix("_") in inexact.split()
        and not (node.func.attr in ("sqrt", "ldexp") and ast.unparse(node.func.value) == "math")
    }
    assert found == {("exact/elementary", "sqrt")}


def test_sizes() -> None:
    """At most 300 lines a file, 15 modules a folder, and six modules at the top."""
    lengths = {module: len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > 300} == {}
    counts = {folder: len(list((PACKAGE / folder).glob("*.py"))) - 1 for folder in FOLDERS}
    assert {folder: count for folder, count in counts.items() if count > 15} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_every_folder_says_what_it_is_for() -> None:
    for folder in FOLDERS:
        docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
        assert docstring and len(docstring.split()) >= 15, folder


def test_the_document_shows_the_tree() -> None:
    """`docs/architecture.md` opens with the tree: every folder and every file, in order."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    tree = text.partition("```text\n")[2].partition("```")[0]
    shown: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            depth = (len(line) - len(line.lstrip())) // 2  # 0 for the package itself
            folders = [*folders[: depth - 1], name] if depth else []
        elif name.endswith(".py"):
            shown.append("".join([*folders, name]).removesuffix(".py"))
    assert sorted(shown) == [module for module in MODULES if not module.endswith("/__init__")]


def test_tests_mirror_the_package() -> None:
    """A test file stands in the folder of what it tests, under its name, or tests a whole folder."""
    others = {"deploy", "documents", "helpers", "launchers"}
    folders = {path.name for path in (REPOSITORY / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders - others <= set(FOLDERS)
