"""Digests: equal for equal values in any memory layout, different for any difference."""

import hashlib
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from distributed_mnist.common.digest import START_OF_CHAIN, chain, digest


def test_pinned() -> None:
    """Published digests of weights and data must stay comparable for years."""
    value = {"b": [1, 2.5, None, True, "x"], "a": torch.arange(3, dtype=torch.float32)}
    assert digest(value) == "ebb6101ce774c69664e67065c283b651fe12335bfa230b12d9bb4b190ffb5f27"


def test_order_of_a_dictionary_does_not_matter() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({1: "x", "1": "y"}) == digest({"1": "y", 1: "x"})


def test_layout_in_memory_does_not_matter() -> None:
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    expected = digest(tensor)
    wide = torch.zeros(2, 3, 4, 10)
    wide[..., ::2] = tensor
    assert digest(tensor.contiguous(memory_format=torch.channels_last)) == expected
    assert digest(wide[..., ::2]) == expected
    assert digest(tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)) == expected
    assert digest(tensor.clone().requires_grad_()) == expected
    assert digest(torch.nn.Parameter(tensor)) == expected

    array = tensor.numpy()
    assert digest(np.asfortranarray(array)) == digest(array)
    assert digest(wide.numpy()[..., ::2]) == digest(array)
    assert digest(array.astype(">f4")) == digest(array)


def test_an_expanded_tensor_equals_its_copy() -> None:
    assert digest(torch.ones(1).expand(4)) == digest(torch.ones(4))


DIFFERENT: list[Any] = [
    torch.zeros(4),
    -torch.zeros(4),
    torch.ones(4),
    torch.tensor([0.0, 0.0, 0.0, 1e-45]),
    torch.zeros(4, dtype=torch.float64),
    torch.zeros(8, dtype=torch.bfloat16),
    torch.zeros(8, dtype=torch.float16),
    torch.zeros(4, dtype=torch.int32),
    torch.zeros(2, 2),
    torch.zeros(4, 1),
    torch.zeros(1, 4),
    torch.zeros(16, dtype=torch.uint8),
    torch.zeros(16, dtype=torch.int8),
    torch.zeros(16, dtype=torch.bool),
    torch.zeros(0),
    torch.zeros(0, 3),
    torch.zeros(()),
    torch.tensor([1.0, 2.0]),
    torch.tensor([2.0, 1.0]),
    np.zeros(4, dtype=np.uint16),
    np.array(["a"]),
    np.array(["b"]),
    0,
    -1,
    1,
    True,
    False,
    "1",
    "",
    1.0,
    0.0,
    -0.0,
    float("nan"),
    float("inf"),
    1.0000000000000002,
    10**40,
    None,
    "None",
    [],
    {},
    [[]],
    [[], []],
    [{}],
    [1, 2],
    [2, 1],
    [[1], 2],
    [1, [2]],
    [[1, 2]],
    ["ab", "c"],
    ["a", "bc"],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {1: 1},
    {"1": 1},
    {"a": 1, "b": 2},
    {"a": 2, "b": 1},
    {"a": {"b": 1}},
    ["a", 1],
]


def test_different_values_have_different_digests() -> None:
    digests = [digest(value) for value in DIFFERENT]
    same = [
        (DIFFERENT[i], DIFFERENT[j])
        for i, j in combinations(range(len(digests)), 2)
        if digests[i] == digests[j]
    ]
    assert same == []


def test_one_flipped_bit_changes_the_digest() -> None:
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    digests = {digest(torch.from_numpy(values.copy()))}
    for place in range(0, 50 * 32, 37):
        flipped = values.copy()
        flipped.view(np.uint32)[place // 32] ^= np.uint32(1 << place % 32)
        digests.add(digest(torch.from_numpy(flipped)))
    assert len(digests) == 1 + len(range(0, 50 * 32, 37))


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, 1j, torch.float32, np.array([object()])])
def test_unknown_types_are_refused(value: object) -> None:
    for nested in (value, [value], {"a": value}):
        with pytest.raises(TypeError):
            digest(nested)


def test_a_chain_is_sha256_of_the_previous_digest_and_the_ids() -> None:
    link = hashlib.sha256(b"").digest()
    chained = START_OF_CHAIN
    assert chained == link.hex()
    for ids in ([3, 1, 2], [0], [], [2**40, 5]):
        link = hashlib.sha256(link + b"".join(i.to_bytes(8, "little") for i in ids)).digest()
        chained = chain(chained, np.array(ids, dtype=np.int64))
        assert chained == link.hex()


def test_a_chain_depends_on_order_and_cuts_but_not_on_the_integer_type() -> None:
    ids = np.array([5, 7, 9])
    expected = chain(START_OF_CHAIN, ids)
    assert chain(START_OF_CHAIN, ids.astype(np.int32)) == expected
    assert chain(START_OF_CHAIN, ids.astype(">i8")) == expected
    assert chain(START_OF_CHAIN, ids[::-1]) != expected
    assert chain(chain(START_OF_CHAIN, ids[:1]), ids[1:]) != expected
