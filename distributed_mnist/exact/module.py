"""Run a model in exact arithmetic."""

from torch import Tensor, nn

from .functions import ExactFunctions
from .passes import Pass, TrainingPass


class ExactModule(nn.Module):
    """A model whose passes are exact. In training, `pass_` collects what the step needs."""

    def __init__(self, model: nn.Module, pass_: Pass) -> None:
        super().__init__()
        self.model, self.pass_ = model, pass_

    @property
    def is_trial(self) -> bool:
        """Whether the present pass only finds scales: its samples do not count."""
        return isinstance(self.pass_, TrainingPass) and self.pass_.starting

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 `(n, classes)`."""
        with ExactFunctions(self.pass_):
            return self.model(images)
