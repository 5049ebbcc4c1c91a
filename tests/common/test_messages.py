"""Values that ranks send each other: what comes out is what went in, or an error."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_mnist.common.messages import decode, encode


@dataclass(frozen=True)
class Inner:
    numbers: tuple[int, ...]
    where: Path


@dataclass(frozen=True)
class Outer:
    inner: list[Inner]
    content: bytes
    losses: dict[int, float]
    note: str | None = None


VALUE = Outer([Inner((1, 2), Path("a/b"))], bytes(range(256)), {3: 0.1 + 0.2, 5: math.inf}, "é")


def test_dataclasses() -> None:
    assert decode(encode(VALUE), Outer) == VALUE


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, type(None)), ({1, 2}, set[int]), (2**63, int), (5e-324, float), ([], list[str])],
)
def test_plain_values(value: Any, kind: type) -> None:
    assert decode(encode(value), kind) == value


def test_a_path_that_is_not_utf8() -> None:
    assert decode(encode(Path("runs/caf\udce9")), Path) == Path("runs/caf\udce9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_tensors(dtype: torch.dtype) -> None:
    value = {"a": torch.arange(12).to(dtype).reshape(3, 4).t(), "empty": torch.zeros(0, 3, dtype=dtype)}
    found = decode(encode(value), dict[str, torch.Tensor])
    assert found.keys() == value.keys()
    for name, tensor in value.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "value",
    [object(), Path, lambda: 1, Exception("x"), torch.float32],
    ids=["object", "class", "function", "error", "dtype"],
)
def test_what_cannot_be_sent(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another rank"):
        encode([value])


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04\x95", encode({}), encode({"inner": 1}), encode(VALUE)[:-1], encode(VALUE) + b"\0"],
)
def test_wrong_messages(data: bytes) -> None:
    with pytest.raises(ValueError, match="a message that is no"):
        decode(data, Outer)


@pytest.mark.parametrize(
    "parts", [("float64", (1,), bytes(8)), ("float32", (2,), bytes(4)), (1, 2), "text"]
)
def test_wrong_tensors(parts: object) -> None:
    with pytest.raises(ValueError, match="a message that is no"):
        decode(encode(parts), torch.Tensor)
