"""Losses and optimizers of a user's own, named on the command line as `user_functions:NAME`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_mnist.optim.optimizers import Optimizer


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal loss (Lin and others, 2017) of each sample."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return torch's own cross-entropy with label smoothing."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def divided(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits, labels) / len(labels)


def centred(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits - logits.mean(0), labels)


def hardest(logits: Tensor, labels: Tensor) -> Tensor:
    losses = smoothed(logits, labels)
    return losses * (losses >= losses.median())


def noisy(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits + torch.randn_like(logits), labels)


def infinite(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits, labels) / 0


def constant(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.ones(len(logits))


class Lion(torch.optim.Optimizer):
    """The Lion optimizer (Chen and others, 2023)."""

    # torch's own methods, without the import of its compiler: a second in each process of a test.
    add_param_group = Optimizer.add_param_group
    state_dict = Optimizer.state_dict
    load_state_dict = Optimizer.load_state_dict
    zero_grad = Optimizer.zero_grad

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.add_(mean.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - beta2)

    step.hooked = True  # type: ignore[attr-defined]


def two_rates(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return SGD with a tenth of the learning rate for the first parameter."""
    groups = [{"params": parameters[:1], "lr": lr / 10}, {"params": parameters[1:]}]
    return torch.optim.SGD(groups, lr=lr)


class Counting(Lion):
    """Counts its steps where no checkpoint can see it."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        super().step()


class Noisy(Lion):
    """Adds noise from the global generator."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p))


class Clearing(Lion):
    """Removes the gradients after a step."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.zero_grad()


class Averaging(Lion):
    """Has a name in its state with which this program marks a mean of the weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("average", torch.zeros_like(p))


class Odd(Lion):
    """Has something in its state that no checkpoint can hold."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "dtype": torch.float32}


def doubling(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    for p in parameters:
        p.data.mul_(2)
    return Lion(parameters, lr)


def without_the_first(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return Lion(parameters[1:], lr)


def without_a_rate(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return Lion(parameters)


def nothing(parameters: list[Tensor], lr: float) -> None:
    pass


def scheduled(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return SGD with a scheduler of torch's, which replaces its `step`."""
    optimizer = torch.optim.SGD(parameters, lr=lr)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer
