"""Export to torch's own graph format, `.pt2`, which needs only torch to run."""

import io
import warnings
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from ..inference.trained import Trained
from .inference_module import InferenceModule, Metadata

_EXTRA = "archive/extra/"  # folder of `extra_files` in the `.pt2`, a zip archive; one file per metadata key


def encode(module: InferenceModule, metadata: Metadata) -> bytes:
    """The file's bytes, identical for identical networks. Raises `torch.export`'s errors."""
    program = module.graph
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A false alarm about weights in channels-last format, which are complete.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], Metadata]:
    """The file as a function, and its metadata. Raises `torch.export.load`'s errors for a bad file."""
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    metadata = {name.removeprefix(_EXTRA): "" for name in names if name.startswith(_EXTRA)}
    program = torch.export.load(io.BytesIO(data), extra_files=metadata)  # fills in the metadata's values
    return program.module(), metadata
