"""Parameters, and views of them, on their way to the activations of a pass.

The gradient of a parameter is a sum over samples, so it must be a sum of integers. torch's autograd adds
floats. So a layer that uses a parameter takes its gradient out of autograd and adds integers itself. If it
uses a view (a slice, a transpose, an expanded copy), it must know which elements of the parameter these
are. `follow` does to the elements' numbers what a function does to the parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_VIEW, _ACTIVATION = "_exact_view", "_exact_activation"


class View(NamedTuple):
    """A parameter that needs a gradient, or a view of it."""

    parameter: Tensor
    places: Tensor | None = None
    """int64 in the shape of the view: which element of the parameter each is. None for the parameter."""
    has_samples: bool = False
    """Whether it was expanded so that every sample has a copy, as a class token is."""


class Views(Protocol):
    """What knows the parameters: a `Pass`."""

    def view_of(self, x: Tensor) -> View | None:
        """Return what `x` is a view of, if it is one of a parameter that needs a gradient."""
        ...


def attached_view(x: Tensor) -> View | None:
    """Return the view that `follow` has attached to a tensor."""
    return getattr(x, _VIEW, None)


def follow(views: Views, function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return `function(x, ...)`. If `x` is a view of a parameter, the result is one too.

    `function` returns a view or a copy of `x`, or a sequence of them.
    """
    result, view = function(x, *args, **kwargs), views.view_of(x)
    if view is None:
        return result
    places = view.places
    if places is None:
        places = torch.arange(x.numel(), device=x.device).view(x.shape)
    followed = function(places, *args, **kwargs)
    for part, part_places in _pairs(result, followed):
        if part.requires_grad and part is not x:
            setattr(part, _VIEW, view._replace(places=part_places))
    return result


def with_samples(x: Tensor) -> None:
    """Note that a view has a copy for every sample."""
    view = attached_view(x)
    if view is not None:
        setattr(x, _VIEW, view._replace(has_samples=True))


def gathered(view: View, integers: Tensor) -> Tensor:
    """Return the sums, in the shape of the parameter, of integers in the shape of a view of it; exact."""
    if view.places is None:
        return integers
    places = view.places
    for dim in range(places.ndim):
        if places.stride(dim) == 0 and places.shape[dim] > 1:  # copies of one element
            integers, places = integers.sum(dim, keepdim=True), places.narrow(dim, 0, 1)
    total = integers.new_zeros(view.parameter.numel())
    return total.index_add_(0, places.reshape(-1), integers.reshape(-1)).view(view.parameter.shape)


def most_copies(view: View) -> int:
    """Return how often the element that is most often in a view is there."""
    return 1 if view.places is None else int(torch.bincount(view.places.reshape(-1)).max())


def mark_activation(x: Tensor) -> None:
    """Note that a tensor is computed from images, so that it has a dimension of samples."""
    if not getattr(x, _ACTIVATION, False):
        setattr(x, _ACTIVATION, torch.is_grad_enabled())


def is_activation(x: Tensor) -> bool:
    """Return whether a tensor is known to be computed from images.

    One that was marked without gradients and has one now is the result of an `autograd.Function`.
    """
    marked = getattr(x, _ACTIVATION, None)
    return bool(marked) or (marked is False and not x.requires_grad)


def _pairs(result: Any, places: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(result, Tensor):
        return [(result, places)]
    return list(zip(result, places, strict=True)) if isinstance(result, list | tuple) else []
