"""Run a model in exact arithmetic."""

import torch
from torch import Tensor, nn

from .functions import ExactFunctions
from .parameter_views import is_activation, mark_activation
from .passes.interface import Pass
from .passes.training_pass import TrainingPass
from .refusal import Refused

_RECOMPUTED = "what is saved for the backward pass by hooks, as for checkpointing, has no exact form"


class ExactModule(nn.Module):
    """A model whose passes are exact. In training, `pass_` collects what the step needs."""

    def __init__(self, model: nn.Module, pass_: Pass) -> None:
        super().__init__()
        self.model, self.pass_ = model, pass_

    @property
    def is_trial(self) -> bool:
        """Whether the present pass only finds scales: its samples do not count."""
        return isinstance(self.pass_, TrainingPass) and self.pass_.starting

    def key_draws(self, *key: int | str, first: int) -> None:
        """Let what the model draws depend on this key. `first` is the first sample's place in the batch."""
        if isinstance(self.pass_, TrainingPass):
            self.pass_.key_draws(*key, first=first)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 `(n, classes)`."""
        self.pass_.samples = len(images)
        mark_activation(images)
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTED), ExactFunctions(self.pass_):
                logits = self.model(images)
        except RuntimeError as error:
            if _RECOMPUTED in str(error):
                raise Refused(_RECOMPUTED) from error
            raise
        if (
            isinstance(self.pass_, TrainingPass)
            and isinstance(logits, Tensor)
            and not is_activation(logits)
        ):
            raise Refused("what an autograd.Function or a compiled function computes has no exact form")
        return logits  # type: ignore[no-any-return]
