"""A user's own optimizer: made by `f(parameters, lr=...)`, and tested before it is used."""

import inspect
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from ..common.digest import digest
from ..common.process_state import changes, defined_state, snapshot
from ..errors import UsageError
from ..user_code.functions import current_folder_last, find
from . import weight_average

_STEPS = 8
"""Steps of the trial before its checkpoint, and after it."""


def make(name: str, parameters: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Make the optimizer `package.module:function`. It must return an optimizer of all these parameters.

    Groups may have learning rates that differ from `lr`. The schedule multiplies them by the same factor.
    Raises `UsageError` if there is no such function, or if runs with this optimizer could not be repeated
    and resumed exactly.
    """
    maker = _Maker(name, lr)
    maker.require_exact(parameters)
    return maker.make(parameters)


class _Maker:
    def __init__(self, name: str, lr: float) -> None:
        self._name, self._lr = name, lr
        self._function = find("--optimizer", name)

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer. Each group gets `lr_ratio`: its learning rate divided by the recipe's."""
        before = [p.detach().clone() for p in parameters]
        try:
            with defined_state(), current_folder_last():
                optimizer = self._function(list(parameters), lr=self._lr)
        except (Exception, SystemExit) as error:
            self._refuse(
                f"called as f(parameters, lr={self._lr}), it fails: {type(error).__name__}: {error}"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            self._refuse(f"it returns a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        if digest(before) != digest([p.detach() for p in parameters]):
            self._refuse("it changes the weights before the first step")
        groups = optimizer.param_groups
        if {id(p) for group in groups for p in group["params"]} != {id(p) for p in parameters}:
            self._refuse("it does not have all parameters that it was given, or it has others")
        if not all(isinstance(group.get("lr"), int | float) for group in groups):
            self._refuse("its groups have no number as lr, which the schedule sets")
        if any("initial_lr" in group for group in groups):
            self._refuse(
                "a scheduler of torch.optim.lr_scheduler is attached to it, but --schedule sets the "
                "learning rate: remove the scheduler"
            )
        for group in groups:
            group["lr_ratio"] = group["lr"] / self._lr
        # Of the class: what replaces it in this object may have been given any signature.
        _, *step = inspect.signature(type(optimizer).step).parameters.values()
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in step):
            self._refuse("its step() needs a closure, as that of LBFGS does, and there is none here")
        setattr(optimizer, "step", partial(self._step, optimizer.step))  # noqa: B010 - it is a method
        return optimizer

    def _step(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (Exception, SystemExit) as error:
            self._refuse(f"its step() fails: {type(error).__name__}: {error}")

    def require_exact(self, parameters: Sequence[Tensor]) -> None:
        """Take steps on copies of the parameters, and the same steps with a checkpoint in the middle."""
        settings = snapshot()
        whole = self._start(parameters)
        self._take(*whole, range(2 * _STEPS))
        for key in weight_average.KEYS:
            if any(key in state for state in whole[1].state.values()):
                self._refuse(f"its state has the name {key!r}, which is that of an average of the weights")
        weights, optimizer = self._start(parameters)
        self._take(weights, optimizer, range(_STEPS))
        saved = self._through_a_file(optimizer.state_dict())
        resumed = self._start(weights)
        resumed[1].load_state_dict(saved)
        self._take(*resumed, range(_STEPS, 2 * _STEPS))
        if digest(whole[0]) != digest(resumed[0]):
            again = self._start(parameters)
            self._take(*again, range(2 * _STEPS))
            if digest(whole[0]) != digest(again[0]):
                self._refuse("it computes other weights when it is repeated, so it draws random numbers")
            self._refuse("it keeps state that is not in its state_dict(), so a run could not be resumed")
        if changed := changes(settings):
            self._refuse(f"it changes torch's {changed}, on which results depend: remove that call")

    def _start(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], torch.optim.Optimizer]:
        copies = [p.detach().clone().requires_grad_() for p in parameters]
        return copies, self.make(copies)

    def _take(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
        """Take steps with random gradients, which are the same for a number of a step."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            gradients = [
                torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) for p in parameters
            ]
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = self._lr * group["lr_ratio"] * (1 - step / (4 * _STEPS))
            optimizer.step()
            if any(p.grad is not gradient for p, gradient in zip(parameters, gradients, strict=True)):
                self._refuse("its step() removes or replaces a parameter's grad: leave that to the program")

    def _through_a_file(self, state: dict[str, object]) -> dict[str, object]:
        """Return a state as it is read from a checkpoint."""
        file = io.BytesIO()
        try:
            digest(state)
            torch.save(state, file)
            file.seek(0)
            return torch.load(file, weights_only=True)
        except Exception as error:
            problem = str(error).strip().splitlines()[0][:120]
            self._refuse(
                "a checkpoint cannot hold its state_dict(), which must consist of tensors and plain "
                f"values: {problem}"
            )

    def _refuse(self, problem: str) -> NoReturn:
        raise UsageError(f"--optimizer {self._name}: {problem}")
