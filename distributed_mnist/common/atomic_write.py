"""Files that are either whole or absent: written beside their final name, then renamed into place."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; on success it is flushed and renamed to `path`.

    The folder is made if need be. When the block raises, the temporary file goes and `path` is as it was;
    a process killed meanwhile leaves a hidden `.part` file that nothing ever reads. Any number of processes
    may write the same `path` at once: each has its own temporary file, and the last rename wins. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    # Made here and not by `tempfile`, whose files nobody but their owner could read.
    part.open("xb").close()
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        part.replace(path)
        flush_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes renames and removals in a folder survive a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in a folder that nobody else writes to now. Raises OSError."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
