"""The global generators: keyed, restored, and another thread's draws noticed or without effect."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distributed_mnist.common import generators
from distributed_mnist.common.generators import (
    DrawsNotShared,
    ModelDraws,
    PrivateDraws,
    ShardDraws,
    drawn_from,
    own_torch_state,
    restored_generators,
    seed_generators,
    seed_torch,
)

CPU = torch.device("cpu")
SOURCES: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(3).tolist(),
    "NumPy": lambda: np.random.rand(3).tolist(),
    "Python": lambda: [random.random() for _ in range(3)],
}


def test_a_key_gives_the_same_numbers_and_another_key_others() -> None:
    def draw(*key: int | str) -> list[list[float]]:
        seed_generators(*key)
        return [source() for source in SOURCES.values()]

    with restored_generators():
        first = draw("noise", 1, 2)
        assert first == draw("noise", 1, 2)
        assert all(a != b for a, b in zip(first, draw("noise", 1, 3), strict=True))
        assert len({tuple(numbers) for numbers in first}) == 3  # NumPy's and Python's are one algorithm


@pytest.mark.parametrize("only_cpu", [True, False])
def test_a_build_for_cpus_is_seeded_as_any_other(only_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "_ONLY_CPU", only_cpu)
    with restored_generators():
        seed_torch(2**63 - 1)
        seeded = torch.initial_seed(), torch.rand(3).tolist()
        torch.manual_seed(2**63 - 1)
        assert seeded == (torch.initial_seed(), torch.rand(3).tolist())


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_the_callers_generators_are_restored(bits: type) -> None:
    kept = np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(bits(3))
    try:
        np.random.randn()  # of a pair: the other half waits
        before = np.random.get_state(legacy=False), random.getstate(), torch.get_rng_state()
        with restored_generators():
            seed_generators("key")
            np.random.randn()
        assert str(np.random.get_state(legacy=False)) == str(before[0])
        assert random.getstate() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    finally:
        np.random.mtrand.set_bit_generator(kept)


def test_judging_a_pass_leaves_the_generator_where_the_pass_left_it() -> None:
    """A backward pass may draw too. It goes on from there."""
    with restored_generators():
        seed_generators("key")
        torch.rand(3)
        before = torch.get_rng_state()
        assert ModelDraws(("torch",)).were_own(2, lambda: own_torch_state(lambda: torch.rand(3), "key")[1])
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("others", [0, 3], ids=["alone", "disturbed"])
@pytest.mark.parametrize("names", [(), ("torch",), ("NumPy",), ("Python",), ("torch", "Python")])
def test_what_a_model_draws_from(names: tuple[str, ...], others: int) -> None:
    disturbances = iter(range(1, others + 1))

    def compute() -> None:
        for name in names:
            SOURCES[name]()
        if (times := next(disturbances, None)) is not None:
            other = threading.Thread(
                target=lambda: [draw() for draw in SOURCES.values() for _ in range(times)]
            )
            other.start()
            other.join()

    with restored_generators():
        assert drawn_from(compute, CPU, "key") == names


def test_draws_that_never_repeat_are_not_judged() -> None:
    with restored_generators():
        numbers = np.random.default_rng()
        assert drawn_from(lambda: np.random.rand(int(numbers.integers(1, 600))), CPU, "key") is None


@pytest.mark.parametrize("name", SOURCES)
def test_a_pass_is_repeated_until_its_draws_are_the_models_own(name: str) -> None:
    draws = ModelDraws((name,))

    def passes(step: int, *, foreign: bool = False) -> bool:
        seed_generators("noise", step)
        SOURCES[name]()
        if foreign:
            SOURCES[name]()
        return draws.were_own(8, lambda: own_torch_state(SOURCES[name], "noise", step)[1])

    with restored_generators():
        first = [passes(1, foreign=True), *(passes(1) for _ in range(3))]
        assert first == ([False, True, True, True] if name == "torch" else [False, False, False, True])
        assert passes(2)  # as many as before
        assert [passes(3, foreign=True), passes(3)] == [False, True]
        SOURCES["torch" if name == "NumPy" else "NumPy"]()
        assert passes(4)  # the model does not draw from the other one


DRAWS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.rand(5),
    lambda: torch.randn(5),
    lambda: torch.randint(9, (5,)),
    lambda: torch.randint(2, 9, (5,)),
    lambda: torch.randperm(9),
    lambda: torch.empty(5).uniform_(),
    lambda: torch.empty(5).normal_(),
    lambda: torch.nn.init.trunc_normal_(torch.empty(5)),
    lambda: torch.nn.init.orthogonal_(torch.empty(4, 4)),
    lambda: torch.bernoulli(torch.full((9,), 0.5)),
    lambda: torch.multinomial(torch.ones(9), 3),
    lambda: torch.normal(0.0, torch.ones(4)),
    lambda: F.dropout(torch.ones(9), 0.5),
    lambda: torch.nn.Linear(3, 2).weight.data,
]


def test_private_draws_are_those_of_the_seed_whatever_others_draw() -> None:
    with restored_generators():
        torch.manual_seed(5)
        expected = [draw() for draw in DRAWS]
        torch.manual_seed(5)
        with PrivateDraws(5):
            for draw, numbers in zip(DRAWS, expected, strict=True):
                assert torch.equal(draw(), numbers)
                other = threading.Thread(target=torch.rand, args=(3,))
                other.start()
                other.join()
        state = torch.get_rng_state()
        torch.manual_seed(5)
        for _ in DRAWS:
            torch.rand(3)
        assert torch.equal(state, torch.get_rng_state())  # it took nothing from the global generator


def test_code_that_seeds_by_itself_draws_from_its_seed() -> None:
    with restored_generators():
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(5)
        with PrivateDraws(5):
            torch.manual_seed(7)
            assert torch.equal(torch.rand(3), expected)


PER_SAMPLE: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: F.dropout(x, 0.3),
    lambda x: F.dropout2d(x, 0.3),
    lambda x: F.alpha_dropout(x, 0.3),
    lambda x: F.dropout(x.flatten(0, 1), 0.3).view(x.shape),  # several rows for each sample
    lambda x: F.dropout(x.to(memory_format=torch.channels_last), 0.3),
    torch.rand_like,
    lambda x: torch.randn_like(x.bfloat16()).float(),
    lambda x: x + torch.bernoulli(torch.full_like(x, 0.25)),
    lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5),
    lambda x: torch.empty_like(x).exponential_(),
]


def test_shards_in_one_pass_draw_what_each_draws_alone() -> None:
    seeds, sizes = [5, 2**40, 7], [3, 4, 3]
    images = torch.randn(10, 2, 5, 5)

    def draw(x: torch.Tensor) -> list[torch.Tensor]:
        return [each(x) for each in PER_SAMPLE]

    with restored_generators():
        alone = []
        for seed, part in zip(seeds, images.split(sizes), strict=True):
            torch.manual_seed(seed)
            alone.append(draw(part))
        torch.manual_seed(0)
        with ShardDraws(seeds, sizes):
            together = draw(images)
        first = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(torch.rand(3), first)  # nothing came from the global generator
    for tensor, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(parts))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(10, 3),
        lambda: torch.randperm(10),
        lambda: F.dropout(torch.ones(7, 10)),
        lambda: F.dropout(torch.ones(())),
        lambda: F.rrelu(torch.ones(10), training=True),
        lambda: torch.ones(10).bernoulli_(generator=torch.Generator()),
    ],
)
def test_draws_that_belong_to_no_sample_are_not_shared(draw: Callable[[], torch.Tensor]) -> None:
    with ShardDraws([1, 2], [5, 5]), pytest.raises(DrawsNotShared):
        draw()
