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
    if text := env.get(SECRET, "").strip():
        name = SECRET
    elif path := env.get(SECRET_FILE, ""):
        name, text = SECRET_FILE, _read_private(Path(path)).strip()
    else:
        return b""
    if len(text) < _SHORTEST:
        raise LaunchError(
            f"{name} has {len(text)} characters: use {_SHORTEST} random ones or more (openssl rand -hex 32)"
        )
    return text.encode()


def _read_private(path: Path) -> str:
    """Read a file that only this user can read. Raises `LaunchError` for any other."""
    try:
        with path.open(errors="surrogateescape") as file:
            _require_private(os.fstat(file.fileno()), path)
            return file.read(10_000)
    except OSError as error:
        raise LaunchError(f"cannot read the secret in {path}: {reason(error)}") from None


def _require_private(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LaunchError(
            f"{path} must belong to this user and be readable by nobody else (chmod go= {path})"
        )


def _users_secret() -> bytes:
    """Return the secret in this user's own temporary folder, which the first process creates."""
    folder = Path(tempfile.gettempdir(), f"dmnist-{os.geteuid()}")
    path = folder / "secret"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _require_private(folder.lstat(), folder)  # otherwise another user may have made it
        if not path.exists():
            _create_once(path, secrets.token_hex(32))
        return _read_private(path).encode()
    except OSError:  # no temporary folder can be written
        return b""


def _create_once(path: Path, text: str) -> None:
    """Create a file with this content. If another process does so first, its content stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(file.name)
