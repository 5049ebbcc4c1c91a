"""Say which layer of a model cannot be computed exactly."""

from types import TracebackType

from torch import nn


class Refused(Exception):
    """A model uses something that has no exact form. The text says what, without a name of the layer."""


def layer_of(error: BaseException, model: nn.Module) -> str:
    """Return the name of the innermost module whose `forward` raised `error`; empty if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found, place = "", error.__traceback__
    while isinstance(place, TracebackType):
        module = place.tb_frame.f_locals.get("self")
        if place.tb_frame.f_code.co_name == "forward" and id(module) in names:
            found = names[id(module)]
        place = place.tb_next
    return found
