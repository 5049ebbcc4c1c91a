"""Write files atomically: under a temporary name in the same folder, then renamed."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success, flush it and rename it to `path`.

    Creates the folder if necessary. If the block raises, the temporary file is removed and `path` is
    unchanged. A process that is killed meanwhile leaves a hidden `.part` file, which nothing reads. Any
    number of processes may write the same `path` at once: each has its own temporary file, and the last
    rename wins. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    # Not by `tempfile`: only the owner could read its files.
    part.open("xb").close()
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut can leave an empty file under the new name
        part.replace(path)
        flush_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do not support it, and do not need it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers. No process may be writing there now. Raises OSError."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
