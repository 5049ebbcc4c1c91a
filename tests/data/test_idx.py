"""IDX files: arrays are written and read back, and any other bytes give an array or a one-line error."""

import gzip
import os
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from distributed_mnist.data import idx
from distributed_mnist.errors import DataError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}

arrays = st.sampled_from(list(CODES)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
)

# No deadline: on a busy machine an example may take any time.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def encoded(array: NDArray[Any]) -> bytes:
    """A second, independent implementation of the format."""
    header = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def packed(data: bytes) -> bytes:
    """gzip without a time stamp, because pytest-xdist needs the same test names in every worker."""
    return gzip.compress(data, mtime=0)


def problem(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        idx.parse(data, "some-file")
    text = str(caught.value)
    assert text.startswith("some-file: ")
    assert text.isprintable()
    return text.removeprefix("some-file: ")


@patient
@given(arrays, st.booleans())
def test_whatever_is_encoded_is_parsed(array: NDArray[Any], zipped: bool) -> None:
    data = encoded(array)
    parsed = idx.parse(gzip.compress(data) if zipped else data, "file")
    assert parsed.dtype == array.dtype
    assert parsed.dtype.isnative
    assert parsed.shape == array.shape
    assert parsed.flags.c_contiguous
    assert parsed.flags.writeable  # torch.from_numpy warns when it is not
    assert encoded(parsed) == data  # bytes, so that NaNs compare too


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dtype", CODES)
def test_written_files_are_the_format_and_are_read_back(tmp_path: Path, dtype: str, suffix: str) -> None:
    array = (np.arange(-60, 60) / 1.5).astype("i1").astype(dtype).reshape(4, 5, 6)
    path = tmp_path / f"file{suffix}"
    for given_array in (array, array.astype(array.dtype.newbyteorder()), np.asfortranarray(array)):
        idx.write(path, given_array)
        raw = path.read_bytes()
        assert (gzip.decompress(raw) if suffix else raw) == encoded(array)
        np.testing.assert_array_equal(idx.read(path), array)


def test_gzip_is_detected_by_content_not_by_name(tmp_path: Path) -> None:
    array = np.arange(10, dtype=np.uint8)
    (tmp_path / "packed").write_bytes(gzip.compress(encoded(array)))
    (tmp_path / "plain.gz").write_bytes(encoded(array))
    np.testing.assert_array_equal(idx.read(tmp_path / "packed"), array)
    np.testing.assert_array_equal(idx.read(tmp_path / "plain.gz"), array)


def test_gzipped_files_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.int32)
    idx.write(tmp_path / "one.gz", array)
    idx.write(tmp_path / "two.gz", array)
    data = (tmp_path / "one.gz").read_bytes()
    assert data == (tmp_path / "two.gz").read_bytes()
    assert data[4:8] == bytes(4)  # no time of writing


def test_digest_is_that_of_the_unpacked_file(tmp_path: Path) -> None:
    import hashlib

    array = np.arange(30, dtype=np.float32).reshape(5, 6)
    assert idx.digest(array) == hashlib.sha256(encoded(array)).hexdigest()


GOOD = encoded(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))  # 16 bytes of header, 24 of numbers


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (packed(b""), "empty"),
        (b"\0\0", "truncated: 2 bytes, an IDX header has at least 4"),
        (b"<!DOCTYPE html>", "not an IDX file: starts with 3c 21 44 4f, not with 00 00"),
        (b"PK\x03\x04", "not an IDX file"),
        (b"\0\0\x0a\x01", "unknown IDX type 0x0a"),
        (b"\0\0\x08\xff" + bytes(1020), "invalid header: 255 dimensions"),
        (GOOD[:10], "truncated: 10 bytes, its header has 16"),
        (GOOD[:30], "truncated: 30 of the 40 bytes that its header declares"),
        (packed(GOOD[:30]), "truncated: 30 of the 40 bytes that its header declares"),
        (GOOD + b"\0", "trailing bytes after the 40 that its header declares"),
        (packed(GOOD + b"\0"), "trailing bytes after the 40"),
        (
            b"\0\0\x08\x03" + b"\xff" * 12,
            "invalid header: it declares 4294967295 x 4294967295 x 4294967295",
        ),
        (b"\0\0\x08\x02" + bytes(4) + b"\xff" * 4 + b"!", "trailing bytes after the 12"),
        (packed(GOOD)[:-9], "truncated: the gzip data ends after"),
        (
            packed(GOOD)[:-8] + bytes(8),
            "damaged gzip data after 40 unpacked bytes (CRC check failed",
        ),
        (packed(GOOD)[:5], "truncated: the gzip data ends after 0 unpacked bytes"),
        (packed(GOOD)[:10] + b"\xff" * 20, "damaged gzip data"),
        (packed(GOOD) + b"junk", "damaged gzip data"),
    ],
)
def test_each_kind_of_damage_has_its_own_message(data: bytes, expected: str) -> None:
    assert problem(data).startswith(expected)


def test_a_header_alone_allocates_nothing() -> None:
    import tracemalloc

    tracemalloc.start()
    text = problem(b"\0\0\x08\x01" + (4_000_000_000).to_bytes(4, "big") + b"abc")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text == "truncated: 11 of the 4000000008 bytes that its header declares"
    assert peak < 10 << 20


@pytest.mark.parametrize("declared", [100, 4_294_967_295])
def test_a_gzip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, declared: int) -> None:
    """64 MiB of zeros in 64 KiB, after a header that declares little, or more than the limit."""
    import tracemalloc

    monkeypatch.setattr(idx, "_MAX_BYTES", 1 << 20)
    bomb = gzip.compress(b"\0\0\x08\x01" + declared.to_bytes(4, "big") + bytes(64 << 20))
    tracemalloc.start()
    text = problem(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text.startswith("trailing bytes" if declared == 100 else "invalid header")
    assert peak < 10 << 20


def test_paths_that_are_not_readable_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "absent": "No such file or directory",
        tmp_path: "not a file",
        tmp_path / "pipe": "not a file",  # and does not wait for someone to write into it
        tmp_path / "absent\0": "cannot be read",
        tmp_path / ("long" * 100): "File name too long",
    }
    for path, expected in cases.items():
        with pytest.raises(DataError) as caught:
            idx.read(path)
        assert str(caught.value) == f"{idx.one_line(path)}: {expected}"


def test_a_name_with_a_newline_stays_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines"
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        idx.read(path)
    assert "\n" not in str(caught.value)
    assert r"two\nlines" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        idx.read(path)


@pytest.mark.parametrize(
    "array", [np.arange(3), np.zeros(2, bool), np.zeros(2, "c8"), np.zeros((1,) * 33, "u1")]
)
def test_arrays_that_the_format_cannot_hold_are_refused(tmp_path: Path, array: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=r"no type for|too many"):
        idx.write(tmp_path / "file", array)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: writes fail in the same place."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    old = np.arange(10, dtype=np.uint8)
    idx.write(path, old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DataError) as caught:
            idx.write(path, np.zeros(100_000, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{path}: cannot be written: File too large"
    np.testing.assert_array_equal(idx.read(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_writing_to_a_folder_that_cannot_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/in: cannot be written: (Not a directory|File exists)"):
        idx.write(tmp_path / "file" / "in", np.zeros(1, np.uint8))


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    idx.write(tmp_path / "file.gz", np.zeros(1, np.uint8))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "file.gz")}
    assert len(modes) == 1


@patient
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_an_array_or_a_data_error(data: bytes, zipped: bool) -> None:
    try:
        assert isinstance(idx.parse(gzip.compress(data) if zipped else data, "file"), np.ndarray)
    except DataError as error:
        assert str(error).isprintable()


@patient
@given(arrays, st.booleans(), st.booleans(), st.data())
def test_mutated_files_give_an_array_or_a_data_error(
    array: NDArray[Any], zipped: bool, zipped_after: bool, data: st.DataObject
) -> None:
    content = bytearray(gzip.compress(encoded(array)) if zipped else encoded(array))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 8)))
        content[start:stop] = data.draw(st.binary(max_size=8))
    mutated = gzip.compress(bytes(content)) if zipped_after else bytes(content)
    try:
        assert isinstance(idx.parse(mutated, "file"), np.ndarray)
    except DataError as error:
        assert str(error).isprintable()


def test_a_small_file_cannot_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    shape = (4_000_000, 28, 28)
    with gzip.open(path, "wb", 1) as file:
        file.write(bytes([0, 0, 8, 3]) + np.array(shape, ">u4").tobytes())
        file.write(bytes(1 << 20))
    size = path.stat().st_size
    tracemalloc.start()
    with pytest.raises(DataError, match="declares 4000000 x 28 x 28 numbers, too many for so small a file"):
        idx.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    blank = np.zeros((60_000, 28, 28), np.uint8)[:10_000]  # compresses by a factor of a thousand
    idx.write(path, blank)
    assert path.stat().st_size < 20 * size
    np.testing.assert_array_equal(idx.read(path), blank)
