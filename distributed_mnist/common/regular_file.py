"""Open files whose paths come from a user: a pipe or a device in their place may block or never end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes. Raises `OSError`, also for a folder, a pipe and a device."""
    # Without a writer, an opened pipe would block; no regular file does.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise kind(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a regular file of up to `most` bytes. Raises `OSError` as `open_regular`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= most:
            return file.read()
    raise OSError(errno.EFBIG, f"larger than {most >> 20:,} megabytes", str(path))
