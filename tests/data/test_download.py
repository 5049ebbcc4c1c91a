"""Downloads from local HTTP servers: mirrors that are dead, wrong or correct."""

import contextlib
import gzip
import hashlib
import io
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from distributed_mnist.data import catalog, datasets, download, idx
from distributed_mnist.data.catalog import ENTRIES, ROLES, Entry, Role
from distributed_mnist.data.locate import NotFoundError
from distributed_mnist.errors import DataError

Arrays = dict[Role, NDArray[Any]]


@dataclass
class Mirror:
    """A server of `files`, with its address and the names that were requested."""

    base: str
    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    status: int = 200
    cut: dict[str, int] = field(default_factory=dict)  # remaining number of transfers that break off
    sized: bool = True  # whether it sends Content-Length

    @property
    def host(self) -> str:
        return self.base.removeprefix("http://").partition("/")[0]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], Mirror]]:
    monkeypatch.setenv("NO_PROXY", "*")
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(files: dict[str, bytes]) -> Mirror:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/data/")
                mirror.asked.append(name)
                status = mirror.status if name in mirror.files else 404
                body = mirror.files.get(name, b"") if status == 200 else b"<html>no</html>"
                self.send_response(status)
                if mirror.sized:
                    self.send_header("Content-Length", str(len(body)))
                if "gzip" in self.headers.get("Accept-Encoding", ""):
                    # Many servers send this for a .gz file; the client would then unpack it in transit.
                    self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                if mirror.cut.get(name, 0) > 0:
                    mirror.cut[name] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}/data/", files)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return mirror

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dead() -> Iterator[Mirror]:
    """An address that refuses connections: the port is bound, but nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Mirror(f"http://127.0.0.1:{taken.getsockname()[1]}/data/", {})


def content(shift: int = 0) -> Arrays:
    rng = np.random.default_rng(shift)
    return {
        "train_images": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "train_labels": ((np.arange(30) + shift) % 10).astype(np.uint8),
        "test_images": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "test_labels": ((np.arange(20) + shift) % 10).astype(np.uint8),
    }


def packed(array: NDArray[Any], level: int = 6) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), level, mtime=0)


def published(entry: Entry, arrays: Arrays, level: int = 6) -> dict[str, bytes]:
    """Return the files on a server, by name."""
    return {f"{entry.file(role).name}.gz": packed(arrays[role], level) for role in ROLES}


def register(monkeypatch: pytest.MonkeyPatch, name: str, arrays: Arrays) -> Entry:
    """Make `arrays` the published content of `name`."""
    entry = ENTRIES[name]
    files = []
    for role in ROLES:
        if entry.file(role).sha256:
            files.append(replace(entry.file(role), sha256=idx.digest(arrays[role])))
        else:
            files.append(replace(entry.file(role), gz_md5=hashlib.md5(packed(arrays[role])).hexdigest()))
    changed = replace(entry, files=tuple(files))
    monkeypatch.setitem(catalog.ENTRIES, name, changed)
    return changed


def failure(entry: Entry, root: Path, *mirrors: Mirror) -> str:
    with pytest.raises(DataError) as caught:
        download.fetch(entry, root, mirrors=[mirror.base for mirror in mirrors])
    assert str(caught.value).isprintable()
    return str(caught.value)


def leftovers(root: Path) -> list[Path]:
    """Return the temporary files under `root`."""
    return [path for path in root.rglob("*") if path.is_file() and path.name.startswith(".")]


Serve = Callable[[dict[str, bytes]], Mirror]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_downloads_into_torchvisions_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, name: str
) -> None:
    arrays = content()
    entry = register(monkeypatch, name, arrays)
    mirror = serve(published(entry, arrays))
    root = tmp_path / "new" / "data"
    seen: list[tuple[str, int, int | None]] = []
    loaded = datasets.load(name, root, mirrors=[mirror.base], progress=lambda *args: seen.append(args))
    np.testing.assert_array_equal(loaded.test_images, arrays["test_images"])
    folder = root / entry.folder / "raw"
    assert loaded.source == str(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == mirror.files
    for file, data in mirror.files.items():
        assert (file, 0, len(data)) in seen
        assert (file, len(data), len(data)) in seen
    assert sorted(mirror.asked) == sorted(mirror.files)
    assert datasets.fetch(name, root, mirrors=[mirror.base])[0] == folder / "train-images-idx3-ubyte.gz"
    assert len(mirror.asked) == 4  # not asked again


def test_mnist_is_verified_by_content_not_by_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    arrays = content()
    entry = register(monkeypatch, "mnist", arrays)
    mirror = serve(published(entry, arrays, level=1))
    assert datasets.load("auto", tmp_path, mirrors=[mirror.base]).name == "mnist"


def test_a_dead_mirror_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, dead: Mirror
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))
    asked: list[str] = []
    transfer = download._transfer

    def counted(url: str, part: Path, name: str, progress: download.Progress) -> None:
        asked.append(url)
        transfer(url, part, name, progress)

    monkeypatch.setattr(download, "_transfer", counted)
    paths = download.fetch(entry, tmp_path, mirrors=[dead.base, mirror.base])
    assert all(path.is_file() for path in paths)
    assert sum(url.startswith(dead.base) for url in asked) == 1
    assert len(mirror.asked) == 4


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_wrong_content_goes_on_to_the_next_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, name: str
) -> None:
    entry = register(monkeypatch, name, content())
    wrong, right = serve(published(entry, content(1))), serve(published(entry, content()))
    download.fetch(entry, tmp_path, mirrors=[wrong.base, right.base])
    np.testing.assert_array_equal(
        datasets.load(name, tmp_path, download=False).train_images, content()["train_images"]
    )
    assert len(wrong.asked) == len(right.asked) == 4
    assert leftovers(tmp_path) == []


def test_the_error_has_the_reason_of_every_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, dead: Mirror
) -> None:
    entry = register(monkeypatch, "mnist", content())
    absent, refusing, wrong, page, cut = (
        serve(published(entry, content(shift))) for shift in (0, 0, 1, 0, 0)
    )
    first = "train-images-idx3-ubyte.gz"
    absent.files = {}
    refusing.status = 503
    page.files[first] = b"<html>log in to this network</html>"
    cut.cut[first] = 2
    digests = [idx.digest(content(shift)["train_images"])[:12] for shift in (1, 0)]
    assert failure(entry, tmp_path, dead, absent, refusing, wrong, page, cut) == (
        f"no mirror has {first}: {dead.host} (connection failed); {absent.host} (HTTP 404); "
        f"{refusing.host} (HTTP 503); "
        f"{wrong.host} (wrong content: SHA-256 of the content {digests[0]}…, not {digests[1]}…); "
        f"{page.host} (wrong content: not an IDX file: starts with 3c 68 74 6d, not with 00 00); "
        f"{cut.host} (broke off the transfer)"
    )
    assert cut.asked == [first, first]  # once more, no more
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_broken_transfer_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "kmnist", content())
    mirror = serve(published(entry, content()))
    mirror.cut = {"t10k-labels-idx1-ubyte.gz": 1}
    paths = download.fetch(entry, tmp_path, mirrors=[mirror.base])
    assert {path.name: path.read_bytes() for path in paths} == mirror.files
    assert len(mirror.asked) == 5


def test_a_server_without_content_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "kmnist", content())
    mirror = serve(published(entry, content()))
    mirror.sized = False
    totals: set[int | None] = set()
    download.fetch(entry, tmp_path, mirrors=[mirror.base], progress=lambda _, __, total: totals.add(total))
    assert totals == {None}
    mirror.cut = {"train-labels-idx1-ubyte.gz": 1}  # nothing but the checksum can tell
    assert "wrong content: MD5 " in failure(entry, tmp_path / "other", mirror)


def test_a_server_that_never_ends_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve({"train-images-idx3-ubyte.gz": bytes(3 << 20)})
    monkeypatch.setattr(download, "_MAX_BYTES", 1 << 20)
    assert failure(entry, tmp_path, mirror).endswith(f"{mirror.host} (sent more than 1 MiB)")


def test_only_what_is_missing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))
    unpacked = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    idx.write(unpacked, content()["train_images"])
    assert datasets.fetch("mnist", tmp_path, mirrors=[mirror.base])[0] == unpacked
    assert len(mirror.asked) == 3


def test_files_of_another_set_are_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    """KMNIST is downloaded next to the four files of MNIST in the same folder."""
    register(monkeypatch, "mnist", content(1))
    entry = register(monkeypatch, "kmnist", content())
    for name, data in published(entry, content(1)).items():
        (tmp_path / name).write_bytes(data)
    mirror = serve(published(entry, content()))
    assert datasets.load("kmnist", tmp_path, mirrors=[mirror.base]).source == str(tmp_path / "KMNIST/raw")
    assert datasets.load("mnist", tmp_path, download=False).source == str(tmp_path)


def test_auto_draws_when_no_mirror_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Mirror
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    loaded = datasets.load("auto", tmp_path, mirrors=[dead.base], train_size=20, test_size=10)
    assert loaded.name == "generated"
    assert loaded.source == f"drawn by the program: MNIST is not in {tmp_path} and cannot be downloaded"
    assert leftovers(tmp_path) == []


def test_auto_does_not_draw_if_some_of_mnist_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Mirror
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    entry = register(monkeypatch, "mnist", content())
    idx.write(tmp_path / entry.files[0].name, content()["train_images"])
    with pytest.raises(DataError) as caught:
        datasets.load("auto", tmp_path, mirrors=[dead.base], train_size=20, test_size=10)
    lacking = ", ".join(file.name for file in entry.files[1:])
    assert str(caught.value) == (
        f"mnist is not in {tmp_path}/ ({tmp_path} lacks {lacking}) and no mirror could be reached: "
        f"{dead.host} (connection failed); --dataset auto generates digits only if none of MNIST's files "
        "exist"
    )
    assert not isinstance(caught.value, NotFoundError)


def test_mirrors_with_the_same_reason_are_grouped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, dead: Mirror
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    entry = register(monkeypatch, "mnist", content())
    other = Mirror(dead.base.replace("127.0.0.1", "localhost"), {})
    reached = f"no mirror could be reached: {dead.host}, {other.host} (connection failed)"
    assert failure(entry, tmp_path, dead, other, dead) == reached
    root = tmp_path / "none"
    for call, said in (
        (datasets.load, f"mnist is not in {root}/ (no such folder) and {reached}"),
        (datasets.fetch, f"mnist is not in {root}/ (no such folder) and {reached}"),
    ):
        with pytest.raises(DataError) as caught:
            call("mnist", root, mirrors=[dead.base, other.base])
        assert str(caught.value) == said
    empty = [serve({}), serve({})]
    hosts = ", ".join(mirror.host for mirror in empty)
    said = f"no mirror has train-images-idx3-ubyte.gz: {hosts} (HTTP 404)"
    assert failure(entry, tmp_path, *empty) == said


def test_emnist_is_extracted_from_one_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    splits = ("emnist-digits", "emnist-mnist")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for shift, split in enumerate(splits):
            for name, data in published(ENTRIES[split], content(shift)).items():
                archive.writestr(f"gzip/{name}", data)
    mirror = serve({"gzip.zip": buffer.getvalue()})
    md5 = hashlib.md5(buffer.getvalue()).hexdigest()
    for split in splits:
        monkeypatch.setitem(catalog.ENTRIES, split, replace(ENTRIES[split], archive_md5=md5))
    folder = tmp_path / "EMNIST/raw"
    for shift, split in enumerate(splits):
        loaded = datasets.load(split, tmp_path, mirrors=[mirror.base])
        stored = content(shift)["train_images"]
        np.testing.assert_array_equal(loaded.train_images, stored.transpose(0, 2, 1))
        assert len(list(folder.iterdir())) == 1 + 4 * (shift + 1)  # only the split that was wanted
    assert mirror.asked == ["gzip.zip"]
    # A damaged zip is replaced. A zip that lacks a file gives an error that names the zip.
    (folder / "gzip.zip").write_bytes(b"half")
    (folder / "emnist-mnist-test-labels-idx1-ubyte.gz").unlink()
    datasets.fetch("emnist-mnist", tmp_path, mirrors=[mirror.base])
    assert mirror.asked == ["gzip.zip"] * 2
    letters = replace(ENTRIES["emnist-letters"], archive_md5=md5)
    expected = f"{folder / 'gzip.zip'}: has no gzip/emnist-letters-train-images-idx3-ubyte.gz"
    assert failure(letters, tmp_path, mirror) == expected
    assert leftovers(tmp_path) == []


def test_a_zip_with_the_wrong_checksum_is_refused(tmp_path: Path, serve: Serve) -> None:
    mirror = serve({"gzip.zip": b"PK..."})
    text = failure(ENTRIES["emnist-letters"], tmp_path, mirror)
    assert text.startswith(f"no mirror has gzip.zip: {mirror.host} (wrong content: MD5 ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))
    (tmp_path / "MNIST").touch()
    text = failure(entry, tmp_path, mirror)
    assert text.startswith(f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte.gz: cannot be written: ")
    assert mirror.asked == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    """A limit on the file size simulates a full disk: writes fail in the same place."""
    resource = pytest.importorskip("resource")
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        text = failure(entry, tmp_path, mirror)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text == f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte.gz: cannot be written: File too large"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))

    def interrupt(description: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(entry, tmp_path, mirrors=[mirror.base], progress=interrupt)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_fetching_twice_at_once_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    entry = register(monkeypatch, "mnist", content())
    mirror = serve(published(entry, content()))
    with ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(download.fetch, entry, tmp_path, mirrors=[mirror.base]) for _ in range(4)]
        for fetched in fetches:
            assert {path.name: path.read_bytes() for path in fetched.result()} == mirror.files
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("base", ["ftp://host/", "host/path", "", "file:///etc", "http//x"])
def test_invalid_addresses(tmp_path: Path, base: str) -> None:
    with pytest.raises(DataError, match="a mirror's address starts with http"):
        download.fetch(ENTRIES["mnist"], tmp_path, mirrors=[base])


@pytest.mark.parametrize(
    "base", ["http://[bad/", "http://", "http://a..b/", "http://x:port/", "http://user:pw@[/"]
)
def test_unusable_addresses(tmp_path: Path, base: str) -> None:
    with pytest.raises(DataError) as caught:
        download.fetch(ENTRIES["mnist"], tmp_path, mirrors=[base])
    assert str(caught.value).startswith("no mirror could be reached: ")
    assert "not a usable address" in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("what", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_sends_a_byte_now_and_then_is_too_slow(
    what: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    """Before its answer, in its header or in the file; the next mirror is used, and this one no more."""
    monkeypatch.setattr(download, "_SLOW_SECONDS", 0.2)
    entry = register(monkeypatch, "mnist", content())
    good, ended, asked = serve(published(entry, content())), threading.Event(), []

    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        asked.append(connection)
        with connection, contextlib.suppress(OSError):
            connection.sendall(what)
            while not ended.wait(0.02):
                connection.sendall(b"x" if what else b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        slow = f"http://127.0.0.1:{listener.getsockname()[1]}/data/"
        download.fetch(entry, tmp_path, mirrors=[slow, good.base])
        with pytest.raises(DataError, match=r"sent less than 64 KiB in 0 s"):
            download.fetch(entry, tmp_path / "other", mirrors=[slow])
        ended.set()
        thread.join()
    assert len(asked) == 1
    assert len(good.asked) == 4


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "REQUESTS_CA_BUNDLE",
            "/nowhere/ca.pem",
            "TLS CA certificate bundle, invalid path: /nowhere/ca.pem",
        ),
        ("HTTPS_PROXY", "http://127.0.0.1:9", "the proxy in HTTPS_PROXY or HTTP_PROXY fails"),
    ],
)
def test_what_a_network_needs_is_told_as_what_it_is(
    variable: str, value: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DataError, match=text):
        download.fetch(ENTRIES["mnist"], tmp_path, mirrors=["https://192.0.2.1"])


def test_a_certificate_that_is_not_accepted() -> None:
    error = download._explained(requests.exceptions.SSLError("unknown authority"))
    assert "its TLS certificate is not accepted: set REQUESTS_CA_BUNDLE" in str(error)
