"""A user's functions as bytes: what is sent by name, what by value, and what cannot be sent."""

import functools
import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import user_models
from torch import nn

from distributed_mnist.errors import UsageError
from distributed_mnist.user_code.shipping import pack, unpack

LOCK = threading.Lock()
SETTINGS = {"lock": LOCK}
SCRIPT = """
import functools
from torch import nn
WIDTH = 5
@functools.lru_cache(maxsize=7)
def width():
    return WIDTH
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(width(), classes)
def again(classes):
    return Net
"""


def test_a_scripts_functions_are_sent_with_the_values_that_they_have_then() -> None:
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, script)
    sent = pack({name: script[name] for name in ("Net", "again", "width")})
    script["WIDTH"] = 6
    functions = unpack(sent)
    assert functions["Net"](3).layer.weight.shape == (3, 5)
    assert functions["again"](3) is functions["Net"]
    width: Any = functions["width"]
    assert width() == 5
    assert width.cache_parameters()["maxsize"] == 7


def test_what_can_be_imported_is_sent_by_name() -> None:
    sent = pack({"dropout": user_models.dropout})
    assert unpack(sent) == {"dropout": user_models.dropout}
    assert len(sent) < 100


def test_a_module_that_workers_would_not_find_is_sent_by_value(tmp_path: Path) -> None:
    """Such as one that pytest or a notebook loads by its path."""
    (tmp_path / "elsewhere.py").write_text("def helper(n): return n + 1\ndef net(n): return helper(n)\n")
    spec = importlib.util.spec_from_file_location("elsewhere", tmp_path / "elsewhere.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["elsewhere"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        sent = pack({"net": lambda n: module.net(n) + 1, "same": module.net})
    finally:
        del sys.modules["elsewhere"]
    functions = unpack(sent)
    assert (functions["net"](3), functions["same"](3)) == (5, 4)


class Guarded(nn.Module):
    """Its `forward` uses a lock of the module."""

    def forward(self) -> object:
        """Return it."""
        return LOCK


class Derived(Guarded):
    """Inherits it."""


class Callback:
    """Holds a lock."""

    def __init__(self) -> None:
        self.lock = LOCK

    def make(self, classes: int) -> nn.Module:
        """Make a model."""
        return nn.Linear(784, classes)


def recursive(classes: int) -> Any:
    """Call another, which calls this one."""
    return other(classes)


def other(classes: int) -> Any:
    """See `recursive`."""
    return recursive(classes) or LOCK


def local() -> dict[str, Callable[..., Any]]:
    """Return functions that use what cannot be sent."""
    handle, numbers = threading.local(), (i for i in range(3))
    return {
        "a variable": lambda _: handle,
        "an argument": lambda _, numbers=numbers: numbers,
        "a comprehension": lambda _: [numbers for _ in range(2)],
    }


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a variable": (local()["a variable"], "it uses handle, of type _local: cannot pickle"),
    "an argument": (
        local()["an argument"],
        "it uses numbers, of type generator: cannot pickle 'generator'",
    ),
    "a comprehension": (local()["a comprehension"], "it uses numbers, of type generator"),
    "a global": (lambda _: SETTINGS, "it uses SETTINGS, of type dict: cannot pickle '_thread.lock' object"),
    "a class": (Guarded, "it uses LOCK, of type lock"),
    "its base": (Derived, "it uses LOCK, of type lock"),
    "a partial": (functools.partial(dict, bias=LOCK), "it uses bias, of type lock"),
    "a method": (Callback().make, r"processes of nproc: cannot pickle '_thread.lock' object; make such"),
    "two functions": (recursive, "it uses LOCK, of type lock"),
    "a cached one": (functools.cache(recursive), "it uses LOCK, of type lock"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_reason_is_named_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, words = REFUSED[case]
    monkeypatch.setitem(
        sys.modules, __name__, types.ModuleType(__name__)
    )  # as if these could not be imported
    with pytest.raises(UsageError, match=words) as caught:
        pack({"mine:other": user_models.dropout, "mine:net": function})
    assert str(caught.value).startswith("mine:net cannot be sent to the processes of nproc: ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_used_there_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"cannot use what they were sent: ModuleNotFoundError: .*missing"):
        unpack(b"cmissing_module\nnet\n.")
