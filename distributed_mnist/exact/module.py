"""Run a model in exact arithmetic."""

import torch
from torch import Tensor, nn

from .functions import ExactFunctions
from .passes import EvaluationPass, Pass, TrainingPass


class ExactModule(nn.Module):
    """A model whose passes are exact. In training, `pass_` collects what the step needs."""

    def __init__(self, model: nn.Module, pass_: Pass) -> None:
        super().__init__()
        self.model, self.pass_ = model, pass_

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 `(n, classes)`."""
        with ExactFunctions(self.pass_):
            return self.model(images)
