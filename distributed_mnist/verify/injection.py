"""Flip one bit on purpose, to show that the test finds it: `--inject`. Needs no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Self

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("weight", "activation", "message")
_FORM = re.compile(rf"(\d{{1,9}})(-\d{{1,9}})?:(\d{{1,9}})(:({'|'.join(KINDS)}))?", re.ASCII)
_INTEGERS = {4: "int32", 8: "int64"}  # by the size of a float in bytes


@dataclass(frozen=True)
class Injection:
    """Which bit to flip: a random one, which `seed` decides."""

    rank: int
    step: int
    """Counts from one."""
    kind: str
    """One of `KINDS`: a bit of a weight before the step, of the input of a layer, or of the sums that the
    rank receives from the others."""
    seed: int = 0
    sender: int | None = None
    """If it is a bad link: flip a bit whenever this rank sends to `rank` in this step, not only once."""

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """Read `RANK:STEP`, `RANK:STEP:KIND`, or for a link `FROM-TO:STEP`. Raises `UsageError`."""
        match = _FORM.fullmatch(text)
        if match:
            first, second, step, _, kind = match.groups()
            link = second is not None
            rank, sender = (int(second[1:]), int(first)) if link else (int(first), None)
            if int(step) and rank != sender and kind in (("message", None) if link else (*KINDS, None)):
                return cls(rank, int(step), kind or ("message" if link else "weight"), seed, sender)
        raise UsageError(
            "--inject must be RANK:STEP, RANK:STEP:KIND or, for a bad link, FROM-TO:STEP, as in 1:7:weight "
            f"or 0-1:7, not {text!r}; KIND is {', '.join(KINDS[:-1])} or {KINDS[-1]}; steps count from 1"
        )

    def require(self, size: int, steps: int) -> None:
        """Raise `UsageError` unless there are such a rank, step and message."""
        if max(self.rank, self.sender or 0) >= size or self.step > steps:
            ranks = f"the ranks are 0 to {size - 1}" if size > 1 else "the only rank is 0"
            how = "(--nproc or the launcher decides how many)"
            raise UsageError(f"--inject {self.text}: {ranks} {how}, the steps 1 to {steps}")
        if self.kind == "message" and size == 1:
            raise UsageError(f"--inject {self.text}: a single process receives no messages")

    def due(self, rank: int, step: int, group: Sequence[int], *, last: bool) -> bool:
        """Return whether to flip the bit on this rank in this step, in a group.

        `last` is the phase in which a bit is flipped that is flipped only once.
        """
        here = (rank, step) == (self.rank, self.step)
        return here and (last if self.sender is None else self.sender in group)

    @property
    def text(self) -> str:
        """What `parse` reads."""
        sender = "" if self.sender is None else f"{self.sender}-"
        return f"{sender}{self.rank}:{self.step}:{self.kind}"

    def rng(self) -> Random:
        """Return the generator that chooses the bit."""
        return Random(f"{self.seed}/{self.text}")

    def __str__(self) -> str:
        if self.sender is not None:
            what = f"each message from rank {self.sender} to rank {self.rank} in"
        else:
            article = "an" if self.kind == "activation" else "a"
            what = f"{article} {self.kind} on rank {self.rank} in"
        return f"one bit of {what} step {self.step}, --seed {self.seed}"


def flip_bit(tensor: "Tensor", rng: Random) -> str:
    """Flip a random bit of a random element of a float tensor, in place. Return what was flipped."""
    import torch  # noqa: PLC0415 - the command line parses flags without torch

    values = tensor.data  # unlike `detach()`, unnoticed by autograd, as a fault would be
    place = tuple(rng.randrange(size) for size in values.shape)
    bits = 8 * values.element_size()
    bit = rng.randrange(bits)
    mask = -(1 << bit) if bit == bits - 1 else 1 << bit
    before = values[place].clone().view(1)
    after = before.view(getattr(torch, _INTEGERS[values.element_size()])).bitwise_xor(mask)
    values[place] = after.view(values.dtype)[0]
    return f"bit {bit} of element {list(place)}: {before.item()!r} became {values[place].item()!r}"
