"""Say which layer of a model cannot be computed exactly."""

from types import TracebackType

from torch import nn


class Refused(Exception):
    """A model uses something that has no exact form. The text says what, without a name of the layer."""


class OtherLayers(Refused):
    """A pass uses other layers than the first pass did."""

    def __init__(self) -> None:
        super().__init__("layers that differ between images have no exact form")


_ADVICE = {
    "batch_norm": "use GroupNorm or LayerNorm",
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell": "use attention or convolutions",
    "embedding embedding_bag": "use a linear layer",
    "conv1d conv3d conv_transpose2d": "use a two-dimensional convolution",
    "max_pool1d avg_pool1d max_pool3d avg_pool3d": "use pooling in two dimensions",
    "einsum tensordot baddbmm addmm bilinear": "use matmul",
    "var std norm normalize var_mean std_mean": "use mean and sum, or a norm layer",
    "__bool__ item tolist __int__ __float__ __index__ numpy": "a model cannot decide by values of tensors",
    "rand randn rand_like randn_like bernoulli bernoulli_ alpha_dropout randperm randint": "use Dropout",
    "interpolate upsample": "use strides or pooling",
    "hardswish hardsigmoid": "use SiLU or ReLU6",
    "prelu glu rrelu": "use ReLU, GELU or SiLU",
}


def advice(function: str) -> str:
    """Return what to use instead of a function, as the end of a sentence; empty if there is nothing."""
    name = function.rpartition(".")[2]
    return next((f": {text}" for names, text in _ADVICE.items() if name in names.split()), "")


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
