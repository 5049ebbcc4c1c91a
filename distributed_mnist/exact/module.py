"""Run a model in exact arithmetic."""

from torch import Tensor, nn

from .functions import ExactFunctions
from .parameter_views import is_activation, mark_activation
from .passes import Pass, TrainingPass
from .refusal import Refused


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
        with ExactFunctions(self.pass_):
            logits = self.model(images)
        if (
            isinstance(self.pass_, TrainingPass)
            and isinstance(logits, Tensor)
            and not is_activation(logits)
        ):
            raise Refused("what an autograd.Function or a compiled function computes has no exact form")
        return logits  # type: ignore[no-any-return]
