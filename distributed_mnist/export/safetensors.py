"""Export to safetensors: the raw weights by name, for programs that have the network's code."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inference.trained import Trained
from ..models.build import build, place
from .inference_module import InferenceModule, Metadata

_LENGTH_BYTES = 8  # the file starts with its header's length, little-endian


def encode(module: InferenceModule, metadata: Metadata) -> bytes:
    """The file's bytes, identical for identical networks."""
    from safetensors.torch import save  # noqa: PLC0415 - an optional dependency

    # Copied, because the format rejects tensors that share memory, such as weights used in two places.
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.network.state_dict().items()
    }
    return _sort_metadata(save(weights, metadata))


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], Metadata]:
    """A new network of the same model with the file's weights, and the file's metadata.

    The normalisation comes from the metadata. Raises `safetensors`'s errors for a bad file, and
    RuntimeError if weights are missing.
    """
    from safetensors.torch import load  # noqa: PLC0415

    metadata = _split(data)[0]["__metadata__"]
    # Another seed gives other initial weights, so that a weight missing from the file changes the outputs.
    network = build(
        metadata["model"],
        len(trained.class_names),
        trained.recipe.seed + 1,
        trained.image_shape,
        trained.recipe.precision == "exact",
    )
    network.load_state_dict(load(data))
    network = place(network, torch.device("cpu"), trained.image_shape)
    mean, std = float(metadata["mean"]), float(metadata["std"])
    return InferenceModule(network, mean, std, trained.image_shape), metadata


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and its tensor data."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header_end = _LENGTH_BYTES + length
    return json.loads(data[_LENGTH_BYTES:header_end]), data[header_end:]


def _sort_metadata(data: bytes) -> bytes:
    """The same file with sorted metadata, because the library's order varies from call to call."""
    header, tensors = _split(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + tensors
