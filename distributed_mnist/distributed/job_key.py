"""Find the key with which the ranks of a job recognise each other.

It is made from a secret that only the job's processes share. Our own launcher makes one and passes it to
the processes that it forks. Under other launchers it is what the user provides, or on a single host a
random file that only this user can read.
"""

import contextlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..common.placement import Placement
from ..errors import LaunchError, reason

SECRET, SECRET_FILE = "DMNIST_SECRET", "DMNIST_SECRET_FILE"
NO_SECRET = (
    f"{SECRET} is not set: any process that can reach this job's ports can join it "
    "(docs/explanation/security.md says what to set)"
)
_SHORTEST = 16  # characters


def job_key(placement: Placement) -> tuple[bytes, bool]:
    """Return the key (32 bytes), and whether it is secret.

    Without a secret the key is made from the job's name. It then keeps jobs apart, but not intruders.
    Raises `LaunchError` for a file that others can read.
    """
    secret = placement.secret or (_users_secret() if placement.one_host else b"")
    return hmac.digest(secret, placement.job.encode(), "sha256"), bool(secret)


def secret_in(env: Mapping[str, str]) -> bytes:
    """Return the secret that the user provides in these environment variables; empty if there is none.

    Raises `LaunchError` for a secret that is too short, or in a file that others can read.
    """
    if secret := os.fsencode(env.get(SECRET, "").strip()):
        name = SECRET
    elif path := env.get(SECRET_FILE, ""):
        name, secret = SECRET_FILE, _read_private(Path(path)).strip()
    else:
        return b""
    if len(secret) < _SHORTEST:
        raise LaunchError(
            f"{name} is shorter than {_SHORTEST} characters: use random ones (openssl rand -hex 32)"
        )
    return secret


def _read_private(path: Path) -> bytes:
    """Read a file that only this user can read. Raises `LaunchError` for any other."""
    try:
        with path.open("rb") as file:
            _require_private(os.fstat(file.fileno()), path)
            return file.read(10_000)
    except OSError as error:
        raise LaunchError(f"cannot read the secret in {path}: {reason(error)}") from None


def _require_private(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LaunchError(
            f"{path} must belong to this user and be closed to others (chmod go= {path}); or set {SECRET}"
        )


def _users_secret() -> bytes:
    """Return the secret in this user's own folder, which the first process creates; empty if none can.

    A home on some file systems cannot be closed to others: on CIFS, `chmod` has no effect. Then it is in
    the temporary folder. Raises `LaunchError` if another user has been there first.
    """
    refused: LaunchError | None = None
    for find in (_cache_folder, _temporary_folder):
        try:
            folder = find()
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _require_private(folder.lstat(), folder)
            path = folder / "secret"
            if not path.exists():
                _create_once(path, secrets.token_hex(32))
            return _read_private(path)
        except LaunchError as error:
            refused = error
        except (OSError, RuntimeError):  # it cannot be written, or there is no such folder
            continue
    if refused is not None:
        raise refused
    return b""


def _cache_folder() -> Path:
    return Path.home() / ".cache" / "dmnist"


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir(), f"dmnist-{os.geteuid()}")


def _create_once(path: Path, text: str) -> None:
    """Create a file with this content. If another process does so first, its content stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(file.name)
