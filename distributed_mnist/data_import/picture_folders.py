"""Folders of pictures, one for each class: `train/0/1.png`, as torchvision's `ImageFolder` reads them.

The pictures are taken in the order of their names, across the classes. Programs that wrote MNIST as
pictures numbered them, so this is MNIST's own order.
"""

from pathlib import Path

import numpy as np

from ..common.regular_file import open_regular
from ..data.idx import one_line
from ..data.recognise import natural_order
from ..errors import DataError, reason
from .part import ImageStack, Part, PartName, Progress, make_part
from .picture import decode

_NOT_PICTURES = {"thumbs.db", "desktop.ini"}  # Windows puts these into folders


def read(paths: tuple[Path, ...], part: PartName, progress: Progress) -> Part:
    """Read all pictures in the subfolders of a folder, each of which is a class."""
    source = paths[0]
    if len(paths) > 1:
        raise DataError(f"{one_line(source)} and {one_line(paths[1])}: both hold pictures to {part} with")
    try:
        folders = sorted((path for path in _visible(source) if path.is_dir()), key=natural_order)
        found = {folder: [path for path in _visible(folder) if path.is_file()] for folder in folders}
    except OSError as error:
        raise DataError(f"{one_line(source)}: {reason(error)}") from error
    classes = [folder for folder in folders if found[folder]]
    pictures = [(path, label) for label, folder in enumerate(classes) for path in found[folder]]
    pictures.sort(key=lambda picture: (natural_order(picture[0]), picture[1]))
    stack = ImageStack(len(pictures))
    for done, (path, _) in enumerate(pictures):
        try:
            with open_regular(path) as file:
                stack.add(decode(file, one_line(path)), one_line(path))
        except OSError as error:
            raise DataError(f"{one_line(path)}: {reason(error)}") from error
        if done % 256 == 0:
            progress(f"reading pictures to {part} with", done, len(pictures))
    labels = np.array([label for _, label in pictures])
    return make_part(one_line(source), stack.images(), labels, [folder.name for folder in classes])


def _visible(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in _NOT_PICTURES
    ]
