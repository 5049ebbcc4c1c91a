"""Fuzzing with a few files (`fuzz.py` by hand does a million): refused in one line, or read correctly."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import environment

from distributed_mnist.common.digest import digest
from distributed_mnist.data import catalog, datasets, idx
from distributed_mnist.data.catalog import ENTRIES, MNIST_NAMES, ROLES
from distributed_mnist.errors import DataError, DmnistError
from distributed_mnist.runs import checkpoint

# No deadline: on a busy machine an example may take any time.
patient = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
damaged_by = st.randoms(use_true_random=False)


@settings(patient, max_examples=400)
@given(damaged_by)
def test_damaged_idx_files(rng: random.Random) -> None:
    """No error but DataError, and no array that differs from the file."""
    fuzz.judge_idx(*fuzz.idx_file(rng))


@settings(patient, max_examples=300)
@given(damaged_by)
def test_damaged_checkpoints(rng: random.Random) -> None:
    fuzz.judge_checkpoint(*fuzz.checkpoint_file(rng))


def test_every_single_bit_of_a_small_idx_file() -> None:
    """A flipped bit in a header is always detected, because the numbers that follow are counted."""
    data = fuzz.encoded(np.arange(40, dtype=np.uint8).reshape(5, 8))
    header = 4 + 2 * 4
    for bit in range(len(data) * 8):
        content = bytearray(data)
        content[bit // 8] ^= 1 << bit % 8
        how = fuzz.judge_idx(bytes(content), None)
        # The one exception: numbers with a sign are as long as those without.
        same_size = (bit // 8, bit % 8) == (2, 0)
        assert how.startswith("other data" if bit // 8 >= header or same_size else "refused"), bit


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("which", fuzz.checkpoint_files())
def test_single_bytes_of_a_small_checkpoint(which: str, stride: int) -> None:
    data, expected = fuzz.checkpoint_files()[which]
    rng = random.Random(0)
    seen = Counter[str]()
    for place in range(0, len(data), stride):
        content = bytearray(data)
        content[place] ^= rng.randrange(1, 256)
        seen[fuzz.judge_checkpoint(bytes(content), expected)] += 1
    assert seen["refused"] > seen.total() / 3


def put(folder: Path, files: dict[catalog.Role, bytes]) -> None:
    for role, name in zip(ROLES, MNIST_NAMES, strict=True):
        (folder / name).write_bytes(files[role])


def small_mnist() -> dict[catalog.Role, bytes]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 28, 28), np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    return {
        "train_images": fuzz.encoded(images),
        "train_labels": fuzz.encoded(labels),
        "test_images": fuzz.encoded(images[::-1]),
        "test_labels": fuzz.encoded(labels[::-1]),
    }


@settings(patient, max_examples=60)
@given(damaged_by)
def test_a_published_set_is_itself_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """Even if the damaged file is still a valid file, with another pixel or label."""
    files = small_mnist()
    with monkeypatch.context() as patch:
        entry = ENTRIES["mnist"]
        known = [
            replace(entry.file(role), sha256=idx.digest(idx.parse(files[role], "file"))) for role in ROLES
        ]
        patch.setitem(catalog.ENTRIES, "mnist", replace(entry, files=tuple(known)))
        put(tmp_path, files)
        whole = datasets.load("mnist", tmp_path, download=False)
        role = rng.choice(ROLES)
        put(tmp_path, {**files, role: fuzz.damaged(rng, files[role])})
        try:
            found = datasets.load("mnist", tmp_path, download=False)
        except DataError as error:
            assert MNIST_NAMES[ROLES.index(role)] in str(error)
            assert str(error).isprintable()
        else:
            assert all(
                np.array_equal(array, whole.arrays()[role]) for role, array in found.arrays().items()
            )


# ---- The harness itself ----------------------------------------------------------------------------------


def test_the_harness_detects_wrong_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness works: it catches readers that accept wrong files."""
    data, expected = fuzz.checkpoint_files()["ours"]
    monkeypatch.setattr(checkpoint, "digest", lambda value: "always the same")
    forged = checkpoint.encode({**fuzz.content(), "step": 8})
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "decode", lambda data, name: {**fuzz.content(), "step": 8})
    with pytest.raises(AssertionError, match="something else"):
        fuzz.judge_checkpoint(forged, expected)
    monkeypatch.undo()
    assert fuzz.judge_checkpoint(forged, expected) == "refused"
    assert fuzz.judge_checkpoint(data, expected) == "equal"

    monkeypatch.setattr(idx, "parse", lambda data, name: np.zeros(3, np.uint8))
    with pytest.raises(AssertionError, match="something else"):
        fuzz.judge_idx(fuzz.idx_files()[0], None)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_short_fuzzing_run(kind: str) -> None:
    command = [sys.executable, fuzz.__file__, kind, "600", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended
    assert "600 files" in ended.stdout
    assert "0 wrong" in ended.stdout


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.abort()", "exit code -6 of the reader"),
        ("time.sleep(1000)", "nothing after 3 seconds"),
        ("raise KeyError(1)", "KeyError: 1"),
        ("bytearray(64 << 20)", "it took"),
    ],
)
def test_crashes_stalls_and_memory_use_are_detected_and_reproducible(body: str, said: str) -> None:
    program = (
        "import os, sys, time, fuzz\n"
        "def read(rng):\n"
        "    if rng.random() < 0.05:\n"
        f"        {body}\n"
        "    return 'fine'\n"
        f"fuzz.STALLED = {3.0 if 'sleep' in body else 60.0}\n"
        "fuzz.GROWTH = 16 << 20\n"
        "fuzz.KINDS['idx'] = read\n"
        "sys.exit(fuzz.long_run('idx', 60, 5, 2))"
    )
    folder = Path(fuzz.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(),  # it imports from there
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1, ended
    wrong = [line for line in ended.stdout.splitlines() if line.startswith("wrong: ")]
    assert wrong
    assert all(said in line for line in wrong)
    number = int(wrong[0].rpartition(" ")[2])
    assert fuzz.numbers("idx", 5, number).random() < 0.05
    assert f"--seed 5 --only {number}" in wrong[0]


# ---- Whole files with odd content ------------------------------------------------------------------------

ODD: list[Any] = [None, True, -1, 0, 1 << 70, -0.0, float("nan"), "", "x", b"", [], [[]], (), {}, {"a": 1}]
ODD += [{1: {}}, torch.zeros(0), torch.zeros(3, dtype=torch.float64), torch.full((2, 2), float("nan"))]


@settings(patient, max_examples=200)
@given(damaged_by)
def test_odd_values_with_a_correct_digest(rng: random.Random) -> None:
    """Anyone can compute a digest, so the values are checked as well."""
    value: Any = fuzz.content()
    whole = value
    path = []
    while isinstance(value, dict) and value:
        path.append(rng.choice(list(value)))
        inner = value[path[-1]]
        if rng.random() < 0.4 or not isinstance(inner, dict) or not inner:
            value[path[-1]] = rng.choice(ODD)
            break
        value = inner
    try:
        data = checkpoint.encode(whole)
    except TypeError:  # it has no digest: bytes and the like cannot be written at all
        return
    try:
        read = checkpoint.decode(data, "file")
    except DmnistError as error:
        assert "\n" not in str(error)
    else:
        assert digest(read) == digest(whole)


def test_versions_are_text() -> None:
    """They are shown to the user."""
    for versions in ({"torch": torch.zeros(2)}, {"torch": ["2"]}, {1: "2"}):
        data = checkpoint.encode({**fuzz.content(), "versions": versions})
        with pytest.raises(DmnistError, match="file has versions that are not text"):
            checkpoint.decode(data, "file")
