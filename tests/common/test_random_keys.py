"""Keyed random numbers: fixed bits, random access, and different numbers for every key."""

import hashlib

import numpy as np
import pytest

from distributed_mnist.common.random_keys import key, permutation, random_bits, torch_seed, uniform

WORD = 2**64


def philox(counter: int, key: int) -> list[int]:
    """Four numbers of Philox 4x64-10, as in Salmon et al., SC 2011, section 3.3."""
    x = [counter >> 64 * i & WORD - 1 for i in range(4)]
    k0, k1 = key % WORD, key >> 64
    for _ in range(10):
        a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [b >> 64 ^ x[1] ^ k0, b % WORD, a >> 64 ^ x[3] ^ k1, a % WORD]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return x


def test_pinned() -> None:
    """If any of these changed, every trained weight would change."""
    assert key("order", 0, 3) == 0xF9301B3CAC9DA3F4C8C09585FBD57543
    assert torch_seed("init", 0) == 144463753856795913
    assert [hex(bits) for bits in random_bits(6, "order", 0, 3)] == [
        "0x2aaa2938b520e2ac",
        "0x4749ef242b2af81d",
        "0xa2d02c21382a31d4",
        "0x8a296826ad4b7c6b",
        "0x27b99b5070eb2d76",
        "0x9b055bdba99e73da",
    ]
    assert uniform(random_bits(2, "augment", 7, 0)).tolist() == [0.41093323162695783, 0.4351032452380974]
    assert permutation(12, "order", 0, 3).tolist() == [4, 0, 10, 1, 9, 6, 3, 5, 11, 2, 8, 7]


def test_key_is_half_a_sha256_of_its_parts() -> None:
    text = b"str:order\x1fint:0\x1fint:3"
    assert key("order", 0, 3).to_bytes(16, "little") == hashlib.sha256(text).digest()[:16]


def test_bits_are_philox() -> None:
    bits = random_bits(12, "some", 5)
    # NumPy increments the counter before each block: the first block has counter 1.
    assert bits.tolist() == [word for block in (1, 2, 3) for word in philox(block, key("some", 5))]
    assert bits.dtype == np.uint64


@pytest.mark.parametrize("start", [0, 4, 100, 4 * 10**9, 4 * (2**64 + 1)])
def test_random_access(start: int) -> None:
    expected = [word for block in (1, 2) for word in philox(start // 4 + block, key("x"))]
    assert random_bits(7, "x", start=start).tolist() == expected[:7]


def test_start_is_a_position_in_the_same_sequence() -> None:
    assert np.array_equal(random_bits(40, "x")[12:], random_bits(28, "x", start=12))


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_start_within_a_block_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, not {start}"):
        random_bits(1, "x", start=start)


def test_parts_are_not_confused() -> None:
    keys = [
        key(),
        key(""),
        key("", ""),
        key("ab", "c"),
        key("a", "bc"),
        key("abc"),
        key("c", "ab"),
        key(1),
        key("1"),
        key(True),
        key(1, 11),
        key(11, 1),
        key(111),
        key(-1),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("parts", [("init", seed) for seed in range(20)])
def test_seeds_fit_every_torch_generator(parts: tuple[str, int]) -> None:
    assert 0 <= torch_seed(*parts) < 2**63
    assert torch_seed(*parts) == key(*parts) >> 65


def test_uniform_covers_zero_to_below_one() -> None:
    ends = uniform(np.array([0, 2**11 - 1, 2**11, 2**63, 2**64 - 1], dtype=np.uint64))
    assert ends.tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
    many = uniform(random_bits(100_000, "range"))
    assert many.dtype == np.float64
    assert 0 <= many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    # Ten equal bins of 10,000 each: chi-square with 9 degrees of freedom is above 33.7 once in 10,000.
    counts, _ = np.histogram(many, bins=10, range=(0, 1))
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 33.7


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_permutation_has_each_number_once(count: int) -> None:
    order = permutation(count, "order", 0, 0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_permutation_depends_on_every_part() -> None:
    orders = [permutation(50, "order", *parts).tolist() for parts in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(50, "order", 1, 0).tolist() == orders[2]
