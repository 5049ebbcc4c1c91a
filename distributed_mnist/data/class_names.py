"""Names of the classes beside a user's IDX files, which have no place for them: `class-names.txt`.

The file has one name on each line, in the order of the labels. Without it, the names are 0, 1, 2, ...
"""

from pathlib import Path

from ..common.atomic_write import written_aside
from ..common.regular_file import read_regular
from ..errors import DataError, reason
from .decode import MAX_CLASSES
from .idx import one_line

FILE = "class-names.txt"
_MAX_BYTES = 1 << 16


def read(folder: Path) -> tuple[str, ...] | None:
    """Return the names in a folder's file, None if there is none. Raises DataError for an unusable file."""
    path = folder / FILE
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{one_line(path)}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{one_line(path)}: {reason(error)}") from error
    names = tuple(line.strip() for line in text.splitlines())
    if not names or len(names) > MAX_CLASSES or not all(names) or not "".join(names).isprintable():
        raise DataError(
            f"{one_line(path)}: must have one name on each line, for 1 to {MAX_CLASSES} classes"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{one_line(path)}: has a name twice")
    return names


def write(folder: Path, names: tuple[str, ...]) -> Path:
    """Write the names of all classes, completely or not at all, and return the path.

    Raises DataError for names that `read` would refuse, and if the file cannot be written.
    """
    path = folder / FILE
    lines = [" ".join(name.split()) for name in names]
    if len(set(lines)) < len(lines) or not all(lines) or not "".join(lines).isprintable():
        raise DataError(f"{one_line(path)}: class names must be printable and different: {names!a:.80}")
    try:
        with written_aside(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be written: {reason(error)}") from error
    return path
