"""Finding a data set's files under a folder, and making sure that they are what their names say.

MNIST, Fashion-MNIST and KMNIST have files of the same names. Torchvision's folder for a set (say
`KMNIST/raw`) settles which is meant; elsewhere only the content can.
"""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..errors import DataError
from . import catalog, idx
from .catalog import ROLES, Entry, Role
from .idx import one_line


class NotFoundError(DataError):
    """The data set is not there; nothing that is there is damaged."""

    def __init__(self, text: str, *, partly: bool = False) -> None:
        super().__init__(text)
        self.partly = partly  # some of its files are there


@dataclass(frozen=True)
class Found:
    """The four files of a data set, in one folder, read and identified."""

    folder: Path
    paths: dict[Role, Path]
    arrays: dict[Role, NDArray[Any]]  # as stored


class Verdict(NamedTuple):
    """Whether a file is what its name says, and how that is known."""

    ok: bool
    text: str  # "ok", "ok (no published checksum)", or what is wrong


def own_folder(entry: Entry, root: Path) -> Path:
    """Where torchvision keeps the set, and where it is downloaded to."""
    return root / entry.folder / "raw"


def folders(entry: Entry, root: Path) -> list[Path]:
    """Every folder where the set's files may be, the likeliest first."""
    own = own_folder(entry, root)
    if entry.name == "idx":  # files in the folder that the user named go before what was once downloaded
        return [root, root / "raw", own]
    return [own, own / "gzip", root / "raw", root / "gzip", root]


def present(entry: Entry, folder: Path) -> dict[Role, Path]:
    """Those of the four files that are in `folder`, under any of their spellings. Raises DataError."""
    found: dict[Role, Path] = {}
    try:
        for role in ROLES:
            for spelling in entry.file(role).spellings():
                if role not in found and (folder / spelling).is_file():
                    found[role] = folder / spelling
    except OSError as error:
        raise DataError(f"{one_line(folder)}: {error.strerror}") from error
    return found


def missing(entry: Entry, paths: dict[Role, Path]) -> list[str]:
    """The names of the files that are not among `paths`."""
    return [entry.file(role).name for role in ROLES if role not in paths]


def absent(entry: Entry, root: Path, why: str) -> str:
    """A set that is not there, in words that others can go on from."""
    return f"{entry.name} is not in {one_line(f'{root}'.rstrip('/') + '/')} ({why})"


def require_folder(entry: Entry, root: Path) -> None:
    """Raises NotFoundError when there is no such folder, DataError when it is no folder or unreadable."""
    try:
        mode = root.stat().st_mode
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise NotFoundError(absent(entry, root, "no such folder")) from error
    except OSError as error:
        raise DataError(f"{one_line(root)}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise DataError(f"{one_line(root)}: not a folder")


def search(entry: Entry, root: Path) -> Found:
    """Finds, reads and identifies the set's files under `root`.

    Raises NotFoundError when no folder holds all four (the message says which are missing), DataError when
    they are there but damaged or not what their names say.
    """
    require_folder(entry, root)
    reasons: list[str] = []
    partly = False
    for folder in folders(entry, root):
        paths = present(entry, folder)
        lacking = missing(entry, paths)
        if not paths:
            continue
        if lacking:
            reasons.append(f"{one_line(folder)} lacks {', '.join(lacking)}")
            partly = True
            continue
        arrays: dict[Role, NDArray[Any]] = {}
        for role in ROLES:
            arrays[role] = idx.read(paths[role])
            verdict = judge(entry, role, paths[role], arrays[role])
            if not verdict.ok:
                reason = f"{one_line(paths[role])}: {verdict.text}"
                if entry.file(role).sha256 or _is_own(entry, folder):
                    raise DataError(reason)
                reasons.append(reason)  # some other set's, kept in a folder that claims nothing
                break
        else:
            return Found(folder, paths, arrays)
    looked = f"no {entry.files[0].name} or .gz in it or in {entry.folder}/raw"
    raise NotFoundError(absent(entry, root, "; ".join(reasons) or looked), partly=partly)


def judge(entry: Entry, role: Role, path: Path, array: NDArray[Any]) -> Verdict:
    """Whether `array`, read from `path`, is the content that `entry` has for `role`."""
    unknown = Verdict(True, "ok (no published checksum)")
    if entry.name == "idx":
        return unknown
    published = entry.file(role)
    sha256, md5 = idx.digest(array), md5_of(path)
    holds = _holder(sha256, md5)
    if sha256 == published.sha256 or md5 == published.gz_md5:
        return Verdict(True, "ok")
    if published.sha256:
        text = f"checksum mismatch: the content's SHA-256 is {sha256[:12]}…, {entry.name}'s is "
        text += f"{published.sha256[:12]}…{f' (it holds {holds})' if holds else ''}"
        return Verdict(False, f"{text}; --dataset idx takes files as they are")
    if holds not in (None, entry.name):
        return Verdict(False, f"holds {holds}, not {entry.name}")
    # Unpacked files have no published checksum; a `.gz` that somebody packed again has lost its own.
    if published.gz_md5 and path.suffix == ".gz" and entry.shares_names and not _is_own(entry, path.parent):
        text = f"checksum mismatch: its MD5 is {md5[:12]}…, {entry.name}'s is {published.gz_md5[:12]}…"
        return Verdict(False, f"{text}; in a folder {entry.folder}/raw it would be taken as it is")
    return unknown


def md5_of(path: Path) -> str:
    """MD5 of the file as it is. Raises DataError."""
    try:
        with path.open("rb") as file:
            # Compared with published values, no defence: allowed where MD5 is banned from security.
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{one_line(path)}: {error.strerror}") from error


def _is_own(entry: Entry, folder: Path) -> bool:
    """Whether torchvision's layout says that the folder is for this very set."""
    parts = folder.resolve().parts
    return (entry.folder, "raw") in (parts[-2:], parts[-3:-1])


def _holder(sha256: str, md5: str) -> str | None:
    """The data set that a file of this content (SHA-256) or of these bytes (MD5) belongs to."""
    for entry in catalog.ENTRIES.values():
        for published in entry.files:
            if sha256 == published.sha256 or md5 == published.gz_md5:
                return entry.name
    return None
