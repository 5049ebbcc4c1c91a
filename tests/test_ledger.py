"""The record of a run: what was written down comes out, and the digest of ids is the chain done by hand."""

import hashlib
import math

import numpy as np
import pytest
import torch

from distributed_mnist.batches import Batch
from distributed_mnist.digest import START_OF_CHAIN
from distributed_mnist.ledger import Ledger, Page
from distributed_mnist.placement import ALONE
from distributed_mnist.world import World

CPU = torch.device("cpu")
WORLD = World(ALONE, CPU, "none")
BATCH, SHARDS, STEPS = 10, 4, 12
SIZES = [10, 10, 10, 3] * 3
"""Three epochs of 33 samples; the last batch of each has fewer samples than shards."""

ORDER = [np.random.default_rng(epoch).permutation(33) for epoch in range(3)]


def ids_of(step: int) -> list[int]:
    epoch, b = divmod(step, 4)
    return ORDER[epoch][b * BATCH : (b + 1) * BATCH].tolist()


def loss_of(step: int, shard: int) -> float:
    return float(np.float32(1 + step + 0.1 * shard))


def spans(step: int) -> list[tuple[int, int, int]]:
    """Shard, first and past-the-last place of the shards that hold samples."""
    n = SIZES[step]
    cuts = [(v, v * n // SHARDS, (v + 1) * n // SHARDS) for v in range(SHARDS)]
    return [(v, a, b) for v, a, b in cuts if a < b]


def logits_for(labels: torch.Tensor, hits: int) -> torch.Tensor:
    """Logits that are right on the first `hits` and wrong on the rest."""
    guesses = torch.where(torch.arange(len(labels)) < hits, labels, (labels + 1) % 10)
    return torch.nn.functional.one_hot(guesses, 10).float()


def record(
    ledger: Ledger, step: int, shard: int, a: int, b: int, loss: float, ids: list[int] | None = None
) -> int:
    """Write one shard of a step down; the hits among its images."""
    chosen = np.array(ids_of(step)[a:b] if ids is None else ids)
    labels = torch.from_numpy(chosen % 10)
    hits = (step + shard) % (b - a + 1)
    batch = Batch(torch.empty(len(chosen), 0), labels, chosen, a)
    ledger.record(batch, shard, torch.tensor(loss), logits_for(labels, hits))
    return hits


def keep(
    pages: list[int], *, losses: dict[tuple[int, int], float] | None = None
) -> tuple[list[Page], list[int], str]:
    """Record all steps, closing after each of these many; the pages, their hits, the digest at the end."""
    ledger = Ledger(max(pages), BATCH, SHARDS, CPU)
    digest, made, hits, step = START_OF_CHAIN, [], [], 0
    for length in pages:
        hits.append(0)
        for _ in range(length):
            ledger.open(step, SIZES[step])
            for shard, a, b in spans(step):
                hits[-1] += record(
                    ledger, step, shard, a, b, (losses or {}).get((step, shard), loss_of(step, shard))
                )
            step += 1
        assert len(ledger) == length
        page, digest = ledger.close(WORLD, digest)
        assert len(ledger) == 0
        made.append(page)
    assert step == STEPS
    return made, hits, digest


def chained(steps: list[list[int]]) -> str:
    """The chain by hand: SHA-256 of the link before and the ids as 64-bit numbers."""
    link = hashlib.sha256(b"").digest()
    for ids in steps:
        link = hashlib.sha256(link + b"".join(i.to_bytes(8, "little") for i in ids)).digest()
    return link.hex()


CUTS = [[12], [1] * 12, [5, 7], [4, 4, 4], [1, 2, 3, 6], [11, 1]]


@pytest.mark.parametrize("pages", CUTS)
def test_what_was_recorded_comes_out(pages: list[int]) -> None:
    made, hits, _ = keep(pages)
    first = 0
    for page, length, expected_hits in zip(made, pages, hits, strict=True):
        steps = range(first, first + length)
        sums = [sum(loss_of(t, shard) for shard, _, _ in spans(t)) for t in steps]
        assert page.first_step == first
        assert page.losses == pytest.approx(
            [s / SIZES[t] for s, t in zip(sums, steps, strict=True)], rel=1e-12
        )
        assert page.loss_sum == pytest.approx(sum(sums), rel=1e-12)
        assert page.images == sum(SIZES[t] for t in steps)
        assert page.correct == expected_hits
        assert page.first_bad_step() is None
        first += length


@pytest.mark.parametrize("pages", CUTS)
def test_the_digest_does_not_depend_on_where_pages_end(pages: list[int]) -> None:
    assert keep(pages)[2] == chained([ids_of(step) for step in range(STEPS)])


def test_shards_may_come_together() -> None:
    """DDP records several shards in one go, at the first one's place."""
    ledger = Ledger(1, BATCH, SHARDS, CPU)
    ledger.open(0, 10)
    record(ledger, 0, 0, 0, 5, 2.0)
    record(ledger, 0, 2, 5, 10, 3.0)
    page, digest = ledger.close(WORLD, START_OF_CHAIN)
    assert page.losses == [0.5]
    assert digest == chained([ids_of(0)])


def test_sums_are_rounded_once() -> None:
    """float32 numbers added in float32 would lose the small ones."""
    ledger = Ledger(1, 4, 4, CPU)
    ledger.open(0, 4)
    for shard, loss in enumerate([1e8, 1.0, 1.0, -1e8]):
        record(ledger, 0, shard, shard, shard + 1, loss, ids=[shard])
    page, _ = ledger.close(WORLD, START_OF_CHAIN)
    assert page.loss_sum == 2.0
    assert page.losses == [0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pages", [[12], [5, 7], [1] * 12])
@pytest.mark.parametrize("place", [(0, 0), (5, 3), (7, 1), (11, 2)])
def test_a_loss_that_is_not_finite_is_found_at_its_step(
    place: tuple[int, int], pages: list[int], bad: float
) -> None:
    if place not in {(t, v) for t in range(STEPS) for v, _, _ in spans(t)}:
        place = (place[0], spans(place[0])[-1][0])
    made, _, _ = keep(pages, losses={place: bad})
    found = [page.first_bad_step() for page in made if page.first_bad_step() is not None]
    assert found == [place[0]]


def test_the_first_of_several_is_told() -> None:
    made, _, _ = keep(
        [12], losses={(9, 0): math.nan, (4, 0): math.inf, (4, 1): -math.inf, (10, 3): math.nan}
    )
    assert made[0].first_bad_step() == 4
    assert math.isnan(made[0].loss_sum)


def closed(shards: list[tuple[int, int, int, list[int]]]) -> str:
    ledger = Ledger(1, BATCH, SHARDS, CPU)
    ledger.open(0, BATCH)
    for shard, a, b, ids in shards:
        record(ledger, 0, shard, a, b, 1.0, ids=ids)
    return ledger.close(WORLD, START_OF_CHAIN)[1]


def test_twice_never_swapped_or_other_samples_change_the_digest() -> None:
    ids = ids_of(0)
    halves = [(0, 0, 5, ids[:5]), (2, 5, 10, ids[5:])]
    digests = {
        "as it should be": closed(halves),
        "a shard twice": closed([*halves, halves[1]]),
        "a shard never": closed(halves[:1]),
        "one sample in another's place": closed([halves[0], (2, 5, 10, [ids[0], *ids[6:]])]),
        "halves swapped": closed([(0, 0, 5, ids[5:]), (2, 5, 10, ids[:5])]),
        "two samples swapped": closed([(0, 0, 5, [ids[1], ids[0], *ids[2:5]]), halves[1]]),
    }
    assert digests["as it should be"] == chained([ids])
    wrong = [value for name, value in digests.items() if name != "as it should be"]
    assert digests["as it should be"] not in wrong


def test_a_missing_sample_zero_is_told_from_a_present_one() -> None:
    with_zero = closed([(0, 0, 5, [4, 3, 2, 1, 0])])
    assert with_zero != closed([(0, 0, 4, [4, 3, 2, 1])])


def test_a_short_step_after_a_long_one_starts_clean() -> None:
    """A page's rows are used again: nothing of an earlier page may stay in them."""
    ledger = Ledger(1, BATCH, SHARDS, CPU)
    ledger.open(0, 10)
    for shard, a, b in spans(0):
        record(ledger, 0, shard, a, b, 5.0)
    ledger.close(WORLD, START_OF_CHAIN)
    ledger.open(3, 3)
    page, digest = ledger.close(WORLD, START_OF_CHAIN)
    assert (page.first_step, page.images, page.correct, page.losses, page.loss_sum) == (3, 3, 0, [0.0], 0.0)
    assert digest != chained([ids_of(0)[:3]])
