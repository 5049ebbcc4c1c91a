"""Exports as torch's own graph, `.pt2`: needs torch and nothing of ours."""

import io
import json
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .exported import About, Exported, graph
from .trained import Trained

METADATA = "metadata.json"
"""The extra file inside of a `.pt2` that holds the metadata, one JSON object."""


def encode(exported: Exported, about: About) -> bytes:
    """The file's bytes, the same for the same network. Raises what `torch.export` raises."""
    program = graph(exported)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Said of weights with channels last, which are whole all the same.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(about)})
    return buffer.getvalue()


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], About]:
    """What the file computes, and its metadata. Raises what `torch.export.load` raises for a bad file."""
    extra = {METADATA: ""}
    run = torch.export.load(io.BytesIO(data), extra_files=extra).module()
    return run, json.loads(extra[METADATA])
