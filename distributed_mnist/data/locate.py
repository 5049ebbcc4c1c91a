"""Find a data set's files under a folder, and verify that their content matches their names.

MNIST, Fashion-MNIST and KMNIST have files with the same names. In a folder that is named for a set (such as
torchvision's `KMNIST/raw`) the folder identifies the set; elsewhere only the content can.
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
from .recognise import import_hint


class NotFoundError(DataError):
    """The data set is missing, and none of the files that exist is damaged."""

    def __init__(self, text: str, *, incomplete: bool = False) -> None:
        super().__init__(text)
        self.incomplete = incomplete  # some of its files exist


@dataclass(frozen=True)
class FoundFiles:
    """The four files of a data set, in one folder, read and verified."""

    folder: Path
    paths: dict[Role, Path]
    arrays: dict[Role, NDArray[Any]]  # as stored


class Verdict(NamedTuple):
    """Whether a file's content matches its name, and why."""

    ok: bool
    text: str  # "ok", "ok (no published checksum)", or what is wrong


def torchvision_folder(entry: Entry, root: Path) -> Path:
    """Return the folder where torchvision keeps the set, which downloads go to."""
    return root / entry.folder / "raw"


def candidate_folders(entry: Entry, root: Path) -> list[Path]:
    """Return every folder where the set's files may be, the most likely first."""
    own = torchvision_folder(entry, root)
    if entry.name == "idx":  # files in the folder that the user named take precedence over downloaded MNIST
        return [root, root / "raw", own]
    return [own, own / "gzip", root / "raw", root / "gzip", root]


def existing_files(entry: Entry, folder: Path) -> dict[Role, Path]:
    """Return those of the four files that are in `folder`, under any of their names. Raises DataError."""
    paths: dict[Role, Path] = {}
    try:
        for role in ROLES:
            for spelling in entry.file(role).spellings():
                if role not in paths and (folder / spelling).is_file():
                    paths[role] = folder / spelling
    except OSError as error:
        raise DataError(f"{one_line(folder)}: {error.strerror}") from error
    return paths


def require_folder(entry: Entry, root: Path) -> None:
    """Raise NotFoundError if `root` does not exist, DataError if it is not a folder or not readable."""
    try:
        mode = root.stat().st_mode
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that contains NUL
        raise NotFoundError(_not_found(entry, root, "no such folder")) from error
    except OSError as error:
        raise DataError(f"{one_line(root)}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise DataError(f"{one_line(root)}: not a folder")


def find(entry: Entry, root: Path) -> FoundFiles:
    """Find, read and verify the set's files under `root`.

    Raises NotFoundError if no folder has all four (the message says which are missing), and DataError if
    they are damaged or do not match their names.
    """
    require_folder(entry, root)
    reasons: list[str] = []
    incomplete = False
    for folder in candidate_folders(entry, root):
        paths = existing_files(entry, folder)
        missing = [entry.file(role).name for role in ROLES if role not in paths]
        if not paths:
            continue
        if missing:
            reasons.append(f"{one_line(folder)} lacks {', '.join(missing)}")
            incomplete = True
            continue
        arrays: dict[Role, NDArray[Any]] = {}
        for role in ROLES:
            try:
                arrays[role] = idx.read(paths[role])
            except DataError as error:
                mend = "; delete it, and it is downloaded again" if entry.mirrors else ""
                raise DataError(f"{error}{mend}") from error
            verdict = verify(entry, role, paths[role], arrays[role])
            if not verdict.ok:
                reason = f"{one_line(paths[role])}: {verdict.text}"
                if entry.file(role).sha256 or _is_torchvision_folder(entry, folder):
                    raise DataError(reason)
                reasons.append(reason)  # another set's file, in a folder that does not say which set it has
                break
        else:
            return FoundFiles(folder, paths, arrays)
    nothing = f"no {entry.files[0].name} or .gz in it or in {entry.folder}/raw"
    names = [spelling for role in ROLES for spelling in entry.file(role).spellings()]
    wanted = [folder / name for folder in candidate_folders(entry, root) for name in names]
    if folders := [one_line(path) for path in wanted if path.is_dir()]:
        nothing = f"{folders[0]} is a folder, not a file"
    if not reasons and (hint := import_hint(root)):
        nothing, incomplete = f"{nothing}, but {hint}", True
    raise NotFoundError(_not_found(entry, root, "; ".join(reasons) or nothing), incomplete=incomplete)


def verify(entry: Entry, role: Role, path: Path, array: NDArray[Any]) -> Verdict:
    """Check whether `array`, read from `path`, is the content that `entry` has for `role`."""
    unknown = Verdict(True, "ok (no published checksum)")
    if entry.name == "idx":
        return unknown
    published = entry.file(role)
    sha256, md5 = idx.digest(array), md5_of(path)
    owner = _identify(sha256, md5)
    if sha256 == published.sha256 or md5 == published.gz_md5:
        return Verdict(True, "ok")
    if published.sha256:
        text = f"checksum mismatch: the content's SHA-256 is {sha256[:12]}…, {entry.name}'s is "
        text += f"{published.sha256[:12]}…{f' (it holds {owner})' if owner else ''}"
        return Verdict(False, f"{text}; --dataset idx takes files as they are")
    if owner not in (None, entry.name):
        return Verdict(False, f"holds {owner}, not {entry.name}")
    # Unpacked files have no published checksum. A `.gz` that was compressed again has a different one.
    if published.gz_md5 and entry.shares_names and not _is_named_for(entry, path.parent):
        text = "any set's file may have this name, and no checksum of it is known"
        if path.suffix == ".gz":
            text = f"checksum mismatch: its MD5 is {md5[:12]}…, {entry.name}'s is {published.gz_md5[:12]}…"
        folders = f"{entry.folder}/raw or {entry.name}"
        return Verdict(False, f"{text}; in a folder {folders} it would be accepted without this check")
    return unknown


def md5_of(path: Path) -> str:
    """Return the MD5 of the file's bytes. Raises DataError."""
    try:
        with path.open("rb") as file:
            # Not used for security, so it is allowed on systems that forbid MD5 for that.
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{one_line(path)}: {error.strerror}") from error


def _not_found(entry: Entry, root: Path, why: str) -> str:
    """Return the message for a missing set. Callers append to it."""
    return f"{entry.name} is not in {one_line(f'{root}'.rstrip('/') + '/')} ({why})"


def _is_torchvision_folder(entry: Entry, folder: Path) -> bool:
    """Whether this is torchvision's folder for the set, so that the files belong to this set."""
    parts = folder.resolve().parts
    return (entry.folder, "raw") in (parts[-2:], parts[-3:-1])


def _is_named_for(entry: Entry, folder: Path) -> bool:
    """Whether the folder or the one around it has the name of the set."""
    names = {part.lower().replace("_", "-") for part in folder.resolve().parts[-2:]}
    return not names.isdisjoint({entry.name, entry.folder.lower()})


def _identify(sha256: str, md5: str) -> str | None:
    """Return the name of the data set with a file of this content (SHA-256) or these bytes (MD5)."""
    for entry in catalog.ENTRIES.values():
        for published in entry.files:
            if sha256 == published.sha256 or md5 == published.gz_md5:
                return entry.name
    return None
