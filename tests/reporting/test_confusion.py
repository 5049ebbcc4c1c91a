"""Test how a confusion matrix is shown."""

import json
from pathlib import Path

from ranks import dmnist, train
from rich.console import Console

from distributed_mnist.reporting.confusion import per_class, table, worst_pairs

THREE = [[5, 0, 1], [4, 2, 0], [0, 0, 0]]


def shown(confusion: list[list[int]], names: list[str], width: int = 80) -> list[str]:
    console = Console(width=width, record=True)
    console.print(table(confusion, names, width))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_each_class() -> None:
    scores = per_class(THREE, ["a", "b", "c"])
    assert [row["accuracy"] for row in scores] == [5 / 6, 1 / 3, None]
    assert [row["images"] for row in scores] == [6, 6, 0]
    assert worst_pairs(THREE) == [(1, 0, 4), (0, 2, 1)]


def test_the_table() -> None:
    lines = shown(THREE, ["a", "b", "c"])
    assert lines[0].split() == ["true", "a", "b", "c", "images", "wrong", "right"]
    assert lines[1].split() == ["a", "5", "·", "1", "6", "1", "83.33%"]
    assert lines[3].split() == ["c", "·", "·", "0", "0", "0", "–"]  # noqa: RUF001
    assert lines[-1] == "most frequent mistakes: b as a (4), a as c (1)"
    assert shown([[1]], ["x"])[-1] == "no mistakes"


def test_with_many_classes_only_the_accuracies_are_shown() -> None:
    names = [f"class {i}" for i in range(47)]
    confusion = [[990 if i == j else 10 * ((i + 1) % 47 == j) for j in range(47)] for i in range(47)]
    lines = shown(confusion, names)
    assert lines[1].split() == ["class", "0", "1,000", "10", "99.00%"]
    assert max(map(len, lines)) <= 80


def test_long_names_are_numbered_and_wide_screens_show_more() -> None:
    lines = shown(THREE, ["T-shirt", "Shirt", "Shoe"])
    assert lines[0].split() == ["true", "0", "1", "2", "images", "wrong", "right"]
    assert lines[2].split()[:3] == ["Shirt", "1", "4"]
    letters = [chr(ord("a") + i) for i in range(26)]
    confusion = [[800 if i == j else 0 for j in range(26)] for i in range(26)]
    for width, whole in ((150, True), (80, False)):
        lines = shown(confusion, letters, width)
        assert (len(lines[0].split()) == 30) == whole
        assert max(map(len, lines)) <= width


def test_evaluate_shows_the_confusion_matrix(digits: Path, tmp_path: Path) -> None:
    options = ["--dataset", "idx", "--data", digits, "--model", "mlp", "--epochs", "1", "--device", "cpu"]
    result = train(*options, nproc=1, out=tmp_path / "run")
    command = ["evaluate", tmp_path / "run", "--data", digits, "--device", "cpu"]
    scores, again = (json.loads(dmnist(*command, "--json", "--nproc", n).stdout) for n in (1, 3))
    assert again["per_class"] == scores["per_class"]
    assert again["test_accuracy"] == scores["test_accuracy"] == result["test_accuracy"]
    assert sum(row["correct"] for row in scores["per_class"]) == round(300 * result["test_accuracy"])
    assert scores["class_names"] == [str(i) for i in range(10)]
    text = dmnist(*command, "--nproc", 1).stdout
    assert text.count("most frequent mistakes") == 1
    assert f"test accuracy {result['test_accuracy']:.2%}" in text
