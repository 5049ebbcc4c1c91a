"""A user's own loss: `f(logits, labels)`, one number for each sample, differentiated by autograd."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..common.digest import digest
from ..common.process_state import changes, snapshot
from ..errors import UsageError

Function = Callable[[Tensor, Tensor], Tensor]


class OwnLoss:
    """Computes a user's loss and its gradient, shard by shard.

    A shard is the same at any number of processes, and so are the bits of its losses. In a call for all
    samples of a pass they could depend on which shards share it.
    """

    def __init__(self, name: str, function: Function) -> None:
        self._name, self._function = name, function

    def __call__(self, logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what `loss.cross_entropy` returns. `sizes` are those of the shards in `logits`."""
        parts = zip(logits.detach().split(list(sizes)), labels.split(list(sizes)), strict=True)
        try:
            found = [self.of_shard(logits, labels) for logits, labels in parts if len(labels)]
        except UsageError as error:
            error.on_one_rank = True
            raise
        return torch.cat([losses for losses, _ in found]), torch.cat([gradient for _, gradient in found])

    def of_shard(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses `(n,)` of some samples, and the gradient of their sum, `(n, classes)`.

        Raises `UsageError` if the function fails or does not return such losses.
        """
        copy = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        count = len(labels)
        try:
            with torch.enable_grad():  # batch norms' statistics are recomputed without it
                losses = self._function(copy, labels.clone())
                self._require_losses(losses, count)
                gradient = torch.autograd.grad(losses.sum(), copy, allow_unused=True)[0]
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            self.refuse(
                f"it fails on logits {tuple(logits.shape)} and labels ({count},): "
                f"{type(error).__name__}: {error}"
            )
        if gradient is None:
            self.refuse("its losses do not depend on the logits")
        return losses.detach().float(), gradient

    def _require_losses(self, losses: object, count: int) -> None:
        if not isinstance(losses, Tensor):
            self.refuse(f"it returns a {type(losses).__name__}, not a tensor of losses")
        if losses.shape != (count,):
            hint = ', as with reduction="none"' if losses.ndim == 0 else ""
            self.refuse(
                f"it returns shape {tuple(losses.shape)} for {count} samples, not ({count},): it must "
                f"return the loss of each sample{hint}"
            )
        if not losses.is_floating_point() or not losses.requires_grad:
            self.refuse("its losses cannot be differentiated: compute them from the logits with torch")

    def refuse(self, problem: str) -> NoReturn:
        """Raise `UsageError`, which names the loss."""
        raise UsageError(f"--loss {self._name}: {problem}")

    def require_exact(self, classes: int, device: torch.device) -> None:
        """Try the loss on random logits. Raises `UsageError` if it does not allow exact training."""
        generator = torch.Generator().manual_seed(0)
        count = 2 * classes + 3
        logits, others = (torch.randn(count, classes, generator=generator).to(device) for _ in range(2))
        labels = torch.arange(count, device=device) % classes
        others[0], other_labels = logits[0], labels.flip(0)
        other_labels[0] = labels[0]
        settings = snapshot()
        found = self.of_shard(logits, labels)
        if not all(bool(values.isfinite().all()) for values in found):
            self.refuse("a loss or its gradient is not finite for random logits")
        if digest(found) != digest(self.of_shard(logits, labels)):
            self.refuse("it gives other losses when it is repeated: it draws random numbers or keeps state")
        alone = [self.of_shard(logits[i : i + 1], labels[i : i + 1]) for i in range(count)]
        each = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
        for n, more in ((1, self.of_shard(others, other_labels)), (count, each)):
            if not all(
                torch.allclose(first[:n], second[:n], rtol=1e-4, atol=1e-6)
                for first, second in zip(found, more, strict=True)
            ):
                self.refuse(
                    "one sample's loss depends on the other samples or on their number; it must not, and "
                    "the program divides by the batch size itself"
                )
        if changed := changes(settings):
            self.refuse(f"it changes torch's {changed}, on which results depend: remove that call")
