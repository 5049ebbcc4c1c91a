"""`~` in arguments, also where no shell replaces it."""

from pathlib import Path

import pytest

from distributed_mnist.cli.home import expand_home
from distributed_mnist.cli.parser import parse


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("--out=~/run1", "--out=/home/me/run1"),
        ("--out=~", "--out=/home/me"),
        ("~/run1", "/home/me/run1"),
        ("--out=~nobody-of-this-name/x", "--out=~nobody-of-this-name/x"),
        ("--out=a~b", "--out=a~b"),
        ("a/~/b", "a/~/b"),
        ("--epochs=3", "--epochs=3"),
    ],
)
def test_arguments(argument: str, expanded: str) -> None:
    assert expand_home([argument]) == [expanded]


def test_a_command() -> None:
    run = parse(["train", "--out=~/run1", "--data", "~/mnist"]).run
    assert (run.out, run.data) == (Path("/home/me/run1"), Path("/home/me/mnist"))
