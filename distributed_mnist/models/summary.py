"""List the layers of a model, with the shapes of their outputs and their parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_IMAGES = 7
"""How many images pass through the model: a number that is hardly a factor of another size."""


@dataclass(frozen=True)
class Layer:
    """A module of a model."""

    name: str
    """Its path in the model, such as `layers.0`; empty for the model itself."""
    type: str
    output: tuple[int | None, ...] | None
    """Shape of its output, or of the first tensor in it, with None for the number of images. If its rows
    are positions of images, their number follows. None if the model does not call it."""
    parameters: int
    """Number of its own parameters, without those of modules in it. Shared ones count where they come
    first, so that the sum over all layers is the total."""
    calls: int
    """How often one pass calls it."""


@torch.no_grad()
def layers_of(model: nn.Module, image_shape: Sequence[int], device: torch.device) -> list[Layer]:
    """Return all modules of a model, in the order in which it defines them, the model itself first.

    It makes one pass in training mode, over a few random images of `image_shape`, which may change the
    model's buffers.
    """
    outputs: dict[nn.Module, list[Any]] = {module: [] for module in model.modules()}
    handles = [
        module.register_forward_hook(lambda called, _, output: outputs[called].append(_shape(output)))
        for module in outputs
    ]
    try:
        model.train()(torch.randn(_IMAGES, *image_shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    layers, counted = [], set[int]()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(map(id, own))
        shapes = outputs[module]
        parameters = sum(p.numel() for p in own)
        layers.append(
            Layer(name, type(module).__name__, shapes[0] if shapes else None, parameters, len(shapes))
        )
    return layers


def _shape(output: Any) -> tuple[int | None, ...] | None:
    """Return the shape of a module's output, or of the first tensor in it; None if there is none."""
    if isinstance(output, Tensor):
        first, *others = output.shape or (1,)
        positions, rest = divmod(first, _IMAGES)
        if rest or not positions:
            return tuple(output.shape)
        return (None, *((positions,) if positions > 1 else ()), *others)
    values = output.values() if isinstance(output, dict) else output
    inner = map(_shape, values) if isinstance(values, (tuple, list, type({}.values()))) else ()
    return next((shape for shape in inner if shape is not None), None)
