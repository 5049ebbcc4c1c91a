"""Check what the documents show: examples run, commands parse, links and named files exist."""

import code
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from ranks import REPOSITORY, events, train

from distributed_mnist.cli.parser import parse

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PACKAGE = REPOSITORY / "distributed_mnist"
TUTORIAL = REPOSITORY / "docs" / "tutorial" / "tutorial.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBERS = ("--nproc", "--epochs", "--batch-size", "--seed", "--shards", "--micro-batch", "--lr")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of each fenced block."""
    return BLOCK.findall(text)


def lines_of_commands() -> list[str]:
    """Return what the documents tell people to type: lines of fenced blocks, and code in sentences."""
    found: list[str] = []
    for path in DOCUMENTS:
        text = path.read_text()
        for language, content in blocks(text):
            if not language:
                found += [line.partition(" #")[0].strip() for line in content.splitlines()]
        found += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    return list(dict.fromkeys(found))


def words_after(program: str) -> list[list[str]]:
    """Return the words after `program` in each line that runs it; `a|b` becomes two lines."""
    found = []
    for line in lines_of_commands():
        match = re.search(rf"(?:^|[\s/]){re.escape(program)}\s+(.*)", line)
        if match and line.startswith((program, ".venv/bin/", "srun", "mpirun", "torchrun", "python ")):
            words = [re.split(r"\\?\|", word) for word in match[1].split() if word != "..."]
            found += map(list, itertools.product(*words))
    return found


def examples_in(folder: Path, text: str) -> None:
    """Write the TOML and Python examples that have a file name in their first line."""
    for _, content in blocks(text):
        if named := re.match(r"# (\w+\.(?:toml|py))\n", content):
            (folder / named[1]).write_text(content)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_link_targets_exist(path: Path) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_commands_and_flags_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in DOCUMENTS:
        examples_in(tmp_path, path.read_text())
    assert (tmp_path / "mine.toml").exists()
    shown = words_after("dmnist")
    assert len(shown) > 12
    for words in map(complete, shown):
        if "--help" in words:
            with pytest.raises(SystemExit) as end:
                parse(words)
            assert end.value.code == 0
        else:
            parse(words)


def complete(words: list[str]) -> list[str]:
    """Return a command as shown, with values in place of what the document leaves open."""
    pairs = itertools.pairwise(["", *words])
    words = ["2" if before in NUMBERS and word == "N" else word for before, word in pairs]
    if words[0].startswith("-"):  # `dmnist ... --debug`
        return ["train", *words]
    alone = (
        ["evaluate"],
        ["export"],
        ["report"],
        ["watch"],
        ["stop"],
        ["data", "generate"],
        ["data", "import"],
    )
    return (
        [*words, "HERE"] if words in alone else [*words, "HERE", "a.png"] if words == ["predict"] else words
    )


def test_the_original_commands_have_their_flags() -> None:
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / "multi_proc_single_gpu.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = words_after("multi_proc_single_gpu.py")
    assert len(shown) >= 3
    for words in shown:
        script._parser().parse_args(words)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    shown = [line.split()[1] for line in lines_of_commands() if re.match(r"make \w", line)]
    assert {"train", "test"} <= set(shown) <= set(targets)


def test_the_run_folder_page_is_complete(digits: Path, tmp_path: Path) -> None:
    """The page lists every file and every field of every event, and everything that it lists exists."""
    text = (REPOSITORY / "docs" / "reference" / "run-folder.md").read_text()
    words = ("--dataset", "idx", "--data", digits, "--recipe", "classic", "--batch-size", 500)
    words += ("--checkpoint-every", 1)
    train(*words, "--epochs", 1, nproc=2, out=tmp_path)
    train(*words, "--epochs", 2, "--resume", "auto", nproc=2, out=tmp_path)  # writes a notice
    files = set(
        re.findall(r"`([\w./]+)`", "".join(line.split("|")[1] for line in text.splitlines() if "|" in line))
    )
    for path in tmp_path.rglob("*"):
        name = str(path.relative_to(tmp_path))
        assert path.is_dir() or name in files or name.startswith("checkpoints/step_"), name
    documented = {
        row.split("|")[1].strip(" `"): set(re.findall(r"`(\w+)`", row.split("|")[3]))
        for row in text.partition("| event |")[2].splitlines()[2:]
        if row.startswith("|")
    }
    seen = events(tmp_path)
    assert {event["event"] for event in seen} == set(documented) - {"stop", "test"}
    for event in seen:
        missing = set(event) - {"event", "time"} - documented[event["event"]]
        assert not missing, (event["event"], missing)
        unseen = documented[event["event"]] - set(event)
        unseen = {name for name in unseen if not name.startswith("validation")}  # this run has no split
        assert unseen <= {"rank", "host", "pid", "device", "busy", "exchange", "share"}, event


def test_the_files_of_a_data_set_are_named(digits: Path) -> None:
    text = (REPOSITORY / "docs" / "how-to" / "your-own-model-and-data.md").read_text()
    written = {path.name.removesuffix(".gz") for path in digits.iterdir()}
    assert len(written) == 4
    assert all(f"`{name}`" in text for name in written)


@pytest.mark.parametrize("path", [TUTORIAL, REPOSITORY / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_named_source_files_exist(path: Path) -> None:
    named = set(re.findall(r"`([a-z_]+/[a-z_]+\.py)`", path.read_text()))
    assert len(named) >= 5
    for name in named:
        assert (PACKAGE / name).exists() or (REPOSITORY / name).exists(), name


def test_the_reference_is_current() -> None:
    """If this fails, run `python docs/reference/make_commands.py`."""
    folder = REPOSITORY / "docs" / "reference"
    spec = importlib.util.spec_from_file_location("make_commands", folder / "make_commands.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.page() == (folder / "commands.md").read_text()


def test_the_tutorials_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Run the snippets in order and compare what they print with their comments."""
    snippets = [text for language, text in blocks(TUTORIAL.read_text()) if language]
    assert len(snippets) == 5
    for snippet in snippets:
        exec(snippet, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "True"
    assert printed[3] == "[[0, 1], [2, 3, 4], [5, 6, 7]]"
    assert printed[4:7] == ["2.2", "2.5", "False"]
    assert printed[7] == "1 [[(3, 0)]]"
    assert printed[8] == "2 [[(2, 0)], [(2, 1)]]"


def test_the_python_about_exact_arithmetic_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Type the page's snippets into one interpreter. The comment of a `print` is what it prints."""
    text = (REPOSITORY / "docs" / "explanation" / "exact.md").read_text()
    snippets = [content for language, content in blocks(text) if language]
    interpreter = code.InteractiveConsole()
    for snippet in snippets:
        for line in [*snippet.splitlines(), ""]:
            interpreter.push(line)
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", "".join(snippets), re.MULTILINE)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected
    assert printed.err == ""
    assert len(expected) >= 12
