"""Flip one bit on purpose, to show that the test finds it: `--inject RANK:STEP:KIND`. Needs no torch."""

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Self

from ...errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("weight", "activation", "message")
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

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """Read `RANK:STEP` or `RANK:STEP:KIND`. Raises `UsageError`."""
        rank, _, rest = text.partition(":")
        step, _, kind = rest.partition(":")
        if not (rank.isdecimal() and step.isdecimal() and int(step) and (kind or KINDS[0]) in KINDS):
            raise UsageError(
                f"--inject must be RANK:STEP or RANK:STEP:KIND, as in 1:7:weight, not {text!r}; KIND is "
                f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, and steps count from 1"
            )
        return cls(int(rank), int(step), kind or KINDS[0], seed)

    def rng(self) -> Random:
        """Return the generator that chooses the bit."""
        return Random(f"{self.seed}/{self.rank}:{self.step}:{self.kind}")

    def __str__(self) -> str:
        where = {"weight": "a weight", "activation": "an activation", "message": "a message"}[self.kind]
        return f"one bit of {where} on rank {self.rank} in step {self.step}, --seed {self.seed}"


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
