"""Download a data set from its mirrors, verify it, and store it in torchvision's layout.

A download goes to a temporary file, which gets its final name only when it is complete and verified, so two
downloads of the same file at once do no harm. A broken transfer is retried. A mirror that does not answer
is not used for the remaining files.
"""

import contextlib
import queue
import shutil
import threading
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..common.atomic_write import written_aside
from ..errors import DataError
from . import idx
from .catalog import ROLES, Entry, Published
from .idx import one_line
from .locate import existing_files, md5_of, torchvision_folder

Progress = Callable[[str, int, int | None], None]
"""Called with a description, the amount done, and the total amount (None: unknown)."""

_CONNECT_SECONDS = 5
_READ_SECONDS = 30  # for one read, which may return a single byte
_SLOW_SECONDS = 60.0  # for each chunk, and for the answer before the first one
_ATTEMPTS = 2
_MAX_BYTES = 1 << 30  # the largest file needed has 562 MB; a faulty server must not fill the disk
_CHUNK = 1 << 16
_MAX_WAITING_CHUNKS = 16  # that are received, but not written yet
_POLL_SECONDS = 0.5


def silent(description: str, done: int, total: int | None) -> None:
    """A `Progress` that shows nothing."""


class _MirrorError(Exception):
    """A download from one mirror failed. The text is the reason in a few words."""

    def __init__(self, reason: str, *, unreachable: bool = False, retry: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        self.retry = retry  # another attempt may succeed


@dataclass
class _Mirrors:
    """The base addresses of the mirrors, and the reasons why some cannot be reached."""

    bases: Sequence[str]
    progress: Progress
    unreachable: dict[str, str] = field(default_factory=dict)

    def download(self, name: str, destination: Path, verify: Callable[[Path], str | None]) -> None:
        """Download `name` from the first mirror whose copy passes `verify`, which returns None or an error.

        Raises DataError with each mirror's reason if all fail, or if the file cannot be written.
        """
        reasons: dict[str, str] = {}
        try:
            with written_aside(destination) as part:
                for base in self.bases:
                    reason = self.unreachable.get(base) or self._try(base, name, part, verify)
                    if reason is None:
                        return
                    reasons[base] = reason
                raise DataError(self._failure(name, reasons))
        except OSError as error:
            raise DataError(
                f"{one_line(destination)}: cannot be written: {error.strerror or error}"
            ) from error

    def _failure(self, name: str, reasons: dict[str, str]) -> str:
        """Return the message for a file that no mirror provided, with mirrors grouped by reason."""
        grouped = defaultdict[str, dict[str, None]](dict)  # the keys of each value: hosts, in order
        for base, reason in reasons.items():
            grouped[reason][_host(base)] = None
        if not grouped:
            return "no mirror is known"
        shown = "; ".join(f"{', '.join(hosts)} ({reason})" for reason, hosts in grouped.items())
        if all(base in self.unreachable for base in reasons):
            return f"no mirror could be reached: {shown}"
        return f"no mirror has {name}: {shown}"

    def _try(self, base: str, name: str, part: Path, verify: Callable[[Path], str | None]) -> str | None:
        """Download from one mirror into `part`. Return None, or why it failed."""
        reason = "not tried"
        for _ in range(_ATTEMPTS):
            try:
                _transfer(f"{base.rstrip('/')}/{name}", part, name, self.progress)
                return verify(part)
            except _MirrorError as failure:
                reason = str(failure)
                if failure.unreachable:
                    self.unreachable[base] = reason
                if not failure.retry:
                    break
        return reason


def fetch(
    entry: Entry, root: Path, *, mirrors: Sequence[str] | None = None, progress: Progress = silent
) -> list[Path]:
    """Download the files of the set that torchvision's folder under `root` lacks. Return all four paths.

    `mirrors` are base addresses that replace the published ones. Existing files are not verified here.
    Raises DataError if there are no mirrors, if all fail (with each one's reason), or if the files cannot
    be written.
    """
    bases = entry.mirrors if mirrors is None else mirrors
    for base in bases:
        if not base.startswith(("http://", "https://")):
            raise DataError(f"{one_line(base)}: a mirror's address starts with http:// or https://")
    folder = torchvision_folder(entry, root)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        return _fetch_into(folder, entry, _Mirrors(bases, progress))
    except DataError:
        for path in new_folders:
            with contextlib.suppress(OSError):  # not empty, or never created
                path.rmdir()
        raise


def _fetch_into(folder: Path, entry: Entry, mirrors: _Mirrors) -> list[Path]:
    paths = existing_files(entry, folder)
    archive: Path | None = None
    if entry.archive and len(paths) < len(ROLES):
        archive = _fetch_archive(entry, entry.archive, folder, mirrors)
    for role in ROLES:
        if role in paths:
            continue
        published = entry.file(role)
        name = f"{published.name}.gz"
        paths[role] = folder / name
        if archive:
            _extract(archive, f"gzip/{name}", paths[role])
        else:
            mirrors.download(name, paths[role], partial(_problem, published))
    return [paths[role] for role in ROLES]


def _problem(published: Published, part: Path) -> str | None:
    """Return what is wrong with the downloaded file, in a few words, or None."""
    if published.sha256:
        try:
            found, expected = idx.digest(idx.read(part)), published.sha256
        except DataError as error:
            return f"wrong content: {str(error).removeprefix(f'{one_line(part)}: ')}"
        kind = "SHA-256 of the content"
    else:
        found, expected, kind = md5_of(part), published.gz_md5 or "", "MD5"
    return None if found == expected else f"wrong content: {kind} {found[:12]}…, not {expected[:12]}…"


def _fetch_archive(entry: Entry, name: str, folder: Path, mirrors: _Mirrors) -> Path:
    """Return the set's zip file, downloaded unless it exists. It is kept, because other sets share it."""
    published = Published(name, gz_md5=entry.archive_md5)
    path = folder / name
    if not path.is_file() or _problem(published, path):
        mirrors.download(name, path, partial(_problem, published))
    return path


def _extract(archive: Path, member: str, destination: Path) -> None:
    try:
        with (
            written_aside(destination) as part,
            zipfile.ZipFile(archive) as opened,
            opened.open(member) as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except KeyError as error:
        raise DataError(f"{one_line(archive)}: has no {member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{one_line(archive)}: damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{one_line(destination)}: cannot be written: {error.strerror or error}") from error


def _transfer(url: str, part: Path, name: str, progress: Progress) -> None:
    """Make one request and write the response to `part`. Raises _MirrorError, or OSError for `part`.

    A thread receives it, because a server that sends a byte now and then never exceeds the time limit of a
    single read. If the server is too slow, the thread is left behind, and ends with its current read.
    """
    received = queue.Queue[int | bytes | _MirrorError | None](_MAX_WAITING_CHUNKS)
    given_up = threading.Event()
    threading.Thread(target=_receive, args=(url, received, given_up), daemon=True).start()
    total: int | None = None
    done = 0
    try:
        with part.open("wb") as file:
            while (item := _next_item(received, partial(progress, name, done, total))) is not None:
                if isinstance(item, _MirrorError):
                    raise item
                if isinstance(item, int):
                    total = item
                    continue
                done += len(item)
                if done > _MAX_BYTES:
                    raise _MirrorError(f"sent more than {_MAX_BYTES >> 20} MiB")
                file.write(item)
        progress(name, done, total)
    finally:
        given_up.set()


def _next_item(
    received: "queue.Queue[int | bytes | _MirrorError | None]", progress: Callable[[], None]
) -> int | bytes | _MirrorError | None:
    """Return the next item from the thread. Raises _MirrorError if there is none in `_SLOW_SECONDS`."""
    deadline = time.monotonic() + _SLOW_SECONDS
    while True:
        progress()  # also while waiting: it raises an exception if the run is stopped
        with contextlib.suppress(queue.Empty):
            return received.get(timeout=min(_POLL_SECONDS, _SLOW_SECONDS))
        if time.monotonic() > deadline:
            text = f"sent less than {_CHUNK >> 10} KiB in {_SLOW_SECONDS:.0f} s"
            raise _MirrorError(text, unreachable=True)


def _receive(
    url: str, received: "queue.Queue[int | bytes | _MirrorError | None]", given_up: threading.Event
) -> None:
    """In a thread: put the length, if known, and the chunks of a response into the queue; at last None.

    After a failure, a _MirrorError is the last item instead. It ends early once `given_up` is set.
    """
    import requests  # noqa: PLC0415 - slow to import, and rarely needed

    def put(item: int | bytes | _MirrorError | None) -> None:
        while not given_up.is_set():
            with contextlib.suppress(queue.Full):
                return received.put(item, timeout=_POLL_SECONDS)
        return None

    # Without this, a server could compress or unpack the file in transit, which changes the checksum.
    headers = {"Accept-Encoding": "identity"}
    failure: _MirrorError | None = None
    try:
        with requests.get(
            url, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS), headers=headers
        ) as response:
            if not response.ok:
                raise _MirrorError(f"HTTP {response.status_code}")
            length = response.headers.get("Content-Length", "")
            if length.isdecimal():
                put(int(length))
            for chunk in response.iter_content(_CHUNK):
                put(chunk)
                if given_up.is_set():
                    return
    except _MirrorError as error:
        failure = error
    except Exception as error:
        failure = _explained(error)
    put(failure)


def _explained(error: Exception) -> _MirrorError:
    """Return the failure of a mirror for an exception of the libraries that download."""
    import requests  # noqa: PLC0415
    import urllib3  # noqa: PLC0415

    if isinstance(
        error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError
    ):
        return _MirrorError("broke off the transfer", retry=True)
    unusable = f"not a usable address: {type(error).__name__}"
    texts: dict[type[Exception], str] = {  # classes before those that they derive from
        requests.Timeout: "did not answer in time",
        requests.exceptions.SSLError: "its TLS certificate is not accepted: set REQUESTS_CA_BUNDLE",
        requests.exceptions.ProxyError: "the proxy in HTTPS_PROXY or HTTP_PROXY fails",
        requests.ConnectionError: "connection failed",
        requests.exceptions.InvalidSchema: one_line(
            str(error)
        ),  # a SOCKS proxy, without the package for it
        requests.RequestException: unusable,
        urllib3.exceptions.HTTPError: unusable,
        UnicodeError: unusable,
        OSError: one_line(str(error)),  # REQUESTS_CA_BUNDLE names no file
    }
    text = next((texts[kind] for kind in texts if isinstance(error, kind)), f"failed: {error!r}")
    return _MirrorError(text, unreachable=True)


def _host(base: str) -> str:
    """Return the host of a base address, without a user name or password."""
    return one_line(base.partition("//")[2].partition("/")[0].rpartition("@")[2] or base)
