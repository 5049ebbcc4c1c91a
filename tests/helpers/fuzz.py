"""Damage any number of files at random. Each must be refused, or be read with its original content.

    python tests/fuzz.py idx 1000000
    python tests/fuzz.py checkpoints 100000
    python tests/fuzz.py idx --seed 7 --only 123    # one file again: how it is read, and its bytes in hex

File number `i` of seed `s` is the same on every machine. Worker processes read the files, so that one that
crashes or stalls its reader is found and named. Exit code 0: every file was refused in one line or read as
what it holds; 1: not, and how to see it again. `test_fuzz.py` does the same to fewer.
"""

import argparse
import gzip
import io
import multiprocessing
import random
import resource
import secrets
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed_mnist.data import decode, idx
from distributed_mnist.data.catalog import ENTRIES
from distributed_mnist.errors import CheckpointError, DataError

STALLED = 60.0
"""Seconds after which one small file stalls its reader; what is usual is a millisecond."""
GROWTH = 256 << 20
"""Bytes by which a process may grow over one small file; what is usual is none."""
BATCH = 200
"""Files between two reports of a worker."""

Read = Callable[[random.Random], str]
"""Makes a damaged file by random numbers and reads it; how that ended. Raises for what must not be."""


# ---- Damage ----------------------------------------------------------------------------------------------

ODD_NUMBERS = (0, 1, 2, 3, 27, 28, 29, 255, 256, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four random changes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(CHANGES)(rng, content)
    return bytes(content)


def _span(rng: random.Random, content: bytearray) -> slice:
    """A stretch of it, mostly short."""
    start = rng.randrange(len(content) + 1)
    return slice(start, start + rng.choice((1, 1, 2, 4, 8, 64, 512, 4096)))


def _flip(rng: random.Random, content: bytearray) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _replace(rng: random.Random, content: bytearray) -> None:
    if content:
        content[rng.randrange(len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _remove(rng: random.Random, content: bytearray) -> None:
    del content[_span(rng, content)]


def _lose(rng: random.Random, content: bytearray) -> None:
    """Zeros where a disk lost a block."""
    span = _span(rng, content)
    content[span] = bytes(len(content[span]))


def _repeat(rng: random.Random, content: bytearray) -> None:
    span = _span(rng, content)
    content[span.start : span.start] = content[span]


def _insert(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.randbytes(rng.choice((1, 2, 4, 9, 100)))


def _append(rng: random.Random, content: bytearray) -> None:
    content += rng.choice((b"\0", rng.randbytes(7), bytes(content), bytes(512)))


def _exchange(rng: random.Random, content: bytearray) -> None:
    one, other = _span(rng, content), _span(rng, content)
    content[one], content[other] = content[other], content[one]


def _number(rng: random.Random, content: bytearray) -> None:
    """An odd number where one may stand: a size, an offset, a count."""
    near_an_end = rng.choice((rng.randrange(24), max(0, len(content) - rng.randrange(1, 120))))
    start = rng.choice((near_an_end, rng.randrange(len(content) + 1)))
    size = rng.choice((2, 4, 4, 8))
    number = rng.choice((rng.choice(ODD_NUMBERS), 1 << rng.randrange(64))) % (1 << 8 * size)
    content[start : start + size] = number.to_bytes(size, rng.choice(("big", "little")))


CHANGES = (_flip, _replace, _cut, _remove, _lose, _repeat, _insert, _append, _exchange, _number)


# ---- IDX -------------------------------------------------------------------------------------------------

IDX_TYPES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encoded(array: NDArray[Any]) -> bytes:
    """The format as its author describes it, written down a second time."""
    header = bytes([0, 0, IDX_TYPES[array.dtype.str[1:]], array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


@cache
def idx_files() -> list[bytes]:
    """Good ones to begin with: images, labels, QMNIST's table, every type."""
    rng = np.random.default_rng(0)
    arrays: list[NDArray[Any]] = [
        rng.integers(0, 256, (2, 28, 28), np.uint8),
        rng.integers(0, 10, 40).astype(np.uint8),
        rng.integers(0, 10, (5, 8)).astype(np.int32),
        np.zeros((0, 28, 28), np.uint8),
    ]
    arrays += [(rng.standard_normal((3, 4)) * 50).astype(dtype) for dtype in ("i1", "i2", "f4", "f8")]
    return [encoded(array) for array in arrays]


def idx_file(rng: random.Random) -> tuple[bytes, bytes | None]:
    """A damaged file, and the only content that it may be read as; None if no checksum vouches for that.

    Raw, gzipped and then damaged, or damaged and then gzipped.
    """
    whole = rng.choice(idx_files())
    how = rng.choice(("raw", "raw", "gzipped", "inside"))
    if how == "gzipped":
        return damaged(rng, gzip.compress(whole, rng.choice((0, 1, 6, 9)), mtime=0)), whole
    data = bytearray(whole)
    if rng.random() < 0.3:  # a header that promises something else
        place = rng.choice((2, 3, *range(4, 4 + 4 * data[3], 4)))
        edit = bytes([rng.randrange(256)]) if place < 4 else rng.choice(ODD_NUMBERS).to_bytes(4, "big")
        data[place : place + len(edit)] = edit
    else:
        data = bytearray(damaged(rng, whole))
    return (gzip.compress(bytes(data), 1, mtime=0) if how == "inside" else bytes(data)), None


def judge_idx(data: bytes, whole: bytes | None) -> str:
    """Read `data`; AssertionError unless it is refused in one line or read as exactly what it says."""
    try:
        array = idx.parse(data, "file")
    except DataError as error:
        assert str(error).startswith("file: ")
        assert str(error).isprintable(), str(error)
        return "refused"
    # Damage can make a raw file of a gzipped one: 1f 8b 08 00 with zeros for its first two bytes is a
    # header of an array without dimensions. It is read as it says: one number, neither images nor labels.
    zipped = data[:2] == idx.GZIP_MAGIC
    unpacked = gzip.decompress(data) if zipped else data
    assert encoded(array) == unpacked, "it was read as something else than it holds"
    assert whole in (None, unpacked) or not zipped, "gzip's checksum did not notice it"
    fit = [fits(name, array) for name in ("mnist", "qmnist", "emnist-letters")]
    assert whole in (None, unpacked) or not any(fit), "gzip's checksum was lost, and it was taken for data"
    if unpacked in idx_files():
        return "equal"
    return "other data, of the right form" if any(fit) else "other data, no images or labels"


def fits(name: str, array: NDArray[Any]) -> bool:
    """Whether a data set would take the array as its images or its labels."""
    entry, fit = ENTRIES[name], False
    try:
        images = decode.images(entry, Path("file"), array)
        assert images.dtype == np.uint8
        assert images.shape == (len(array), 28, 28)
        fit = True
    except DataError as error:
        assert str(error).isprintable()
    try:
        labels = decode.labels(entry, Path("file"), array)
        assert labels.dtype == np.uint8
        assert labels.shape == (len(array),)
        assert labels.max() < len(entry.class_names)
        fit = True
    except DataError as error:
        assert str(error).isprintable()
    return fit


# ---- Checkpoints -----------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    """A small checkpoint with every kind of value in it."""
    import torch

    return {
        "format": 1,
        "model": {"fc.weight": torch.arange(40.0).reshape(10, 4), "fc.bias": torch.linspace(-1, 1, 10)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((10, 4), 0.1)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": True, "params": [0, 1]}],
        },
        "scales": torch.tensor([0.5, 2.0]),
        "step": 7,
        "best_accuracy": 0.5,
        "best_step": 6,
        "evaluations_since_best": 1,
        "best_weights": {"fc.weight": torch.ones(10, 4), "fc.bias": torch.zeros(10)},
        "samples_sha256": "ab" * 32,
        "totals": {"loss": 1.5, "correct": 3, "images": 8},
        "train_seconds": 0.5,
        "recipe": {"lr": 1e-3, "model": "linear"},
        "dataset": {
            "name": "idx",
            "class_names": ["0"],
            "image_shape": [1, 28, 28],
            "mean": 0.1,
            "std": 0.3,
            "sha256": "cd",
        },
        "steps_per_epoch": 9,
        "versions": {"torch": "2"},
    }


@cache
def checkpoint_files() -> dict[str, tuple[bytes, str | None]]:
    """Good ones to begin with, and the digest of what each holds; None for a file without any checksum."""
    import torch

    from distributed_mnist.common.digest import digest
    from distributed_mnist.runs import checkpoint, original_format

    theirs = original_format.to_original(content())
    del theirs["dmnist"]
    archive, plain = io.BytesIO(), io.BytesIO()
    torch.save(theirs, archive)
    torch.save(theirs, plain, _use_new_zipfile_serialization=False)
    files = {
        "ours": checkpoint.encode(content()),
        "ours as the original's": checkpoint.encode(original_format.to_original(content())),
        "the original's": archive.getvalue(),
    }
    known = {name: (data, digest(checkpoint.decode(data, "file"))) for name, data in files.items()}
    return {**known, "before torch 1.6": (plain.getvalue(), None)}


def checkpoint_file(rng: random.Random) -> tuple[bytes, str | None]:
    """A damaged file, and the digest of what it may be read as; None if no checksum vouches for it."""
    which = rng.choice(("ours", "ours as the original's", "the original's", "before torch 1.6"))
    data, expected = checkpoint_files()[which]
    if rng.random() < 0.7 or which == "before torch 1.6":
        return damaged(rng, data), expected
    # The original script's file has no digest, so a rewritten archive is just another valid file.
    return _with_damaged_record(rng, data), None if which == "the original's" else expected


def _with_damaged_record(rng: random.Random, data: bytes) -> bytes:
    """The archive rewritten with valid checksums, but with one damaged record."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as again:
        names = archive.namelist()
        # Most often the pickle, which is a program.
        chosen = rng.choice((names[0], names[0], rng.choice(names)))
        for name in names:
            record = archive.read(name)
            again.writestr(name, damaged(rng, record) if name == chosen else record)
    return buffer.getvalue()


def judge_checkpoint(data: bytes, expected: str | None) -> str:
    """Read `data`; AssertionError unless it is refused in one line or read as what it was."""
    from distributed_mnist.common.digest import digest
    from distributed_mnist.runs import checkpoint

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            read = checkpoint.decode(data, "file")
        except CheckpointError as error:
            assert str(error).startswith("file")
            assert "\n" not in str(error)
            assert not said, f"not in one line: {said[0].message}"
            return "refused"
    if expected is None:
        return "read, without a checksum to tell"
    assert digest(read) == expected, "it was read as something else than it was"
    return "equal"


# ---- The long run ----------------------------------------------------------------------------------------

KINDS: dict[str, Read] = {
    "idx": lambda rng: judge_idx(*idx_file(rng)),
    "checkpoints": lambda rng: judge_checkpoint(*checkpoint_file(rng)),
}


def numbers(kind: str, seed: int, number: int) -> random.Random:
    """The random numbers that make a file."""
    return random.Random(f"{kind} {seed} {number}")


def memory() -> int:
    """The most that this process has ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(kind: str, seed: int, mine: range, current: Any, pipe: connection.Connection) -> None:
    """A worker: reads its files, tells after each batch, and at once of what goes wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read, counts = KINDS[kind], Counter[str]()
    if kind == "checkpoints":
        import torch

        torch.set_num_threads(1)
        checkpoint_files()
    for done, number in enumerate(mine, start=1):
        current.value = number
        before = memory()
        try:
            counts[read(numbers(kind, seed, number))] += 1
            assert memory() - before < GROWTH, f"it took {(memory() - before) >> 20} MiB"
        except BaseException as error:
            pipe.send((Counter(wrong=1), memory(), (number, f"{type(error).__name__}: {error}")))
        if done % BATCH == 0 or done == len(mine):
            pipe.send((counts, memory(), None))
            counts = Counter()


@dataclass
class Running:
    """A worker, as the process that waits for it sees it."""

    process: Any
    current: Any
    """The number of the file that it reads."""
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False
    """It was, because it stalled."""


def long_run(kind: str, count: int, seed: int, workers: int) -> int:
    """Read `count` files in `workers` processes, print figures, and return the exit code."""
    context = multiprocessing.get_context("fork")
    counts, peak, began = Counter[str](), 0, time.monotonic()
    wrong: list[tuple[int, str]] = []
    running: dict[Any, Running] = {}
    for first in range(workers):
        reader, writer = context.Pipe(duplex=False)
        current = context.Value("q", -1)
        mine = range(first, count, workers)
        process = context.Process(target=work, args=(kind, seed, mine, current, writer), daemon=True)
        process.start()
        writer.close()
        running[reader] = Running(process, current)
    while running:
        for reader in connection.wait(list(running), timeout=1.0):
            worker = running[reader]
            worker.heard = time.monotonic()
            try:
                found, held, problem = reader.recv()  # type: ignore[union-attr]
            except EOFError:
                del running[reader]
                worker.process.join()
                if worker.process.exitcode and not worker.ended:
                    wrong.append(
                        (worker.current.value, f"exit code {worker.process.exitcode} of the reader")
                    )
                continue
            counts += found
            peak = max(peak, held)
            if problem:
                wrong.append(problem)
        for worker in running.values():
            if time.monotonic() - worker.heard > STALLED:
                wrong.append((worker.current.value, f"nothing after {STALLED:.0f} seconds"))
                worker.ended, worker.heard = True, time.monotonic()
                worker.process.kill()
    seconds = time.monotonic() - began
    print(f"{kind}, seed {seed}: {counts.total():,} files in {seconds:.0f} s by {workers} processes")
    for what, times in counts.most_common():
        print(f"{times:12,} {what}")
    print(f"{peak >> 20:12,} MiB at most in one process")
    print(f"{len(wrong):12,} wrong")
    for number, problem in wrong[:20]:
        print(f"wrong: {problem}; again: python tests/fuzz.py {kind} --seed {seed} --only {number}")
    return 1 if wrong or counts.total() != count else 0  # a worker that died leaves files unread


def once_more(kind: str, seed: int, number: int) -> int:
    """Show one file and how it is read."""
    make = idx_file if kind == "idx" else checkpoint_file
    data, _ = make(numbers(kind, seed, number))
    print(f"{len(data)} bytes: {data.hex()}", flush=True)
    print(KINDS[kind](numbers(kind, seed, number)))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    asked = parser.parse_args()
    if asked.only is not None:
        return once_more(asked.kind, asked.seed, asked.only)
    print(f"{asked.kind}: {asked.count:,} files, seed {asked.seed}", flush=True)
    return long_run(asked.kind, asked.count, asked.seed, asked.workers)


if __name__ == "__main__":
    sys.exit(main())
