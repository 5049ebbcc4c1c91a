"""What a user's model raises is told as the model's; defects of this program stay internal errors."""

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_mnist.errors import UsageError
from distributed_mnist.gradients.per_shard import backpropagate
from distributed_mnist.models.build import forward
from distributed_mnist.optim.optimizers import Optimizer
from distributed_mnist.user_code.failures import model_failures

IMAGES = torch.zeros(2, 1, 28, 28)


class Backwards(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise OSError("no file")


class Own(nn.Module):
    """Fails in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(images.flatten(1))
        if self.how == "raise":
            raise ValueError("bad\nnews")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "memory":
            raise MemoryError
        return {"backward": Backwards.apply, "detach": torch.detach}[self.how](logits)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Own("raise"), 'ValueError: bad\nnews (test_failures.py: raise ValueError("bad\\nnews"))'),
        (Own("exit"), "SystemExit: 3 (test_failures.py: sys.exit(3))"),
        (Own("backward"), 'OSError: no file (test_failures.py: raise OSError("no file"))'),
        (Own("detach"), "RuntimeError: element 0 of tensors does not require grad"),
        (nn.Linear(3, 3), "RuntimeError: mat1 and mat2 shapes cannot be multiplied (56x28 and 3x3)"),
    ],
)
def test_failures_of_a_model(model: nn.Module, said: str) -> None:
    def tell(problem: str) -> str:
        return f"step 17: {problem}"

    with pytest.raises(UsageError) as raised, model_failures("mine:model", tell):
        logits = forward(model, IMAGES, "fp32")
        backpropagate(logits, list(model.parameters()), torch.ones_like(logits))
    text = re.sub(r"(\.py:)\d+:", r"\1", str(raised.value))
    assert text.startswith(f"--model mine:model: step 17: {said}")
    assert raised.value.on_one_rank and raised.value.__cause__ is not None


def test_other_failures_pass_unchanged() -> None:
    with pytest.raises(MemoryError), model_failures("mine:model"):
        forward(Own("memory"), IMAGES, "fp32")
    with pytest.raises(UsageError, match="returns a str"), model_failures("mine:model"):
        forward(nn.Identity(), "image", "fp32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bad"), model_failures("cnn"):  # one of this program's
        forward(Own("raise"), IMAGES, "fp32")
    with pytest.raises(TypeError), model_failures("mine:model"):
        backpropagate(None, [], None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), model_failures("mine:model"):
        Optimizer.step(None)  # type: ignore[arg-type]
