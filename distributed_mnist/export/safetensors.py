"""Exports as safetensors: the raw weights under their names, for programs that have the network's code."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inference.trained import Trained
from ..models.zoo import build, place
from .inference_module import About, Exported

_LENGTH = 8  # bytes, little-endian, of the header that follows: the file format's own description


def encode(exported: Exported, about: About) -> bytes:
    """The file's bytes, the same for the same network."""
    from safetensors.torch import save  # noqa: PLC0415 - an extra, not always there

    # Copies: weights that a network uses in two places the format refuses to hold once.
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in exported.network.state_dict().items()
    }
    return _in_order(save(weights, about))


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], About]:
    """What a new network of the same model computes with these weights, and the file's metadata.

    The normalisation is the one that the metadata tells. Raises what `safetensors` raises for a bad file,
    and RuntimeError if weights are missing.
    """
    from safetensors.torch import load  # noqa: PLC0415

    about = _header(data)["__metadata__"]
    network = build(about["model"], len(trained.class_names), trained.recipe.seed + 1)  # other weights
    network.load_state_dict(load(data))
    cpu = torch.device("cpu")
    return Exported(place(network, cpu), float(about["mean"]), float(about["std"])), about


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:_LENGTH], "little")
    return json.loads(data[_LENGTH : _LENGTH + length])


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata by name: the library writes them in another order each time."""
    header = _header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # so that the tensors stay aligned
    length = int.from_bytes(data[:_LENGTH], "little")
    return len(text).to_bytes(_LENGTH, "little") + text + data[_LENGTH + length :]
