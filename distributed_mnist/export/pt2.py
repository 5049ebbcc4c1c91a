"""Exports as torch's own graph, `.pt2`: needs torch and nothing of ours."""

import io
import warnings
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from ..inference.trained import Trained
from .inference_module import About, Exported, graph

_EXTRA = "archive/extra/"  # where in a `.pt2`, which is a zip archive, `extra_files` lie: one a key here


def encode(exported: Exported, about: About) -> bytes:
    """The file's bytes, the same for the same network. Raises what `torch.export` raises."""
    program = graph(exported)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Said of weights with channels last, which are whole all the same.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, buffer, extra_files=dict(about))
    return buffer.getvalue()


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], About]:
    """What the file computes, and its metadata. Raises what `torch.export.load` raises for a bad file."""
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    about = {name.removeprefix(_EXTRA): "" for name in names if name.startswith(_EXTRA)}
    run = torch.export.load(io.BytesIO(data), extra_files=about).module()  # fills in the values
    return run, about
