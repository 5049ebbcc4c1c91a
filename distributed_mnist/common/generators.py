"""The global generators of torch, NumPy and Python, from which a user's model may draw.

The program itself draws by key (`random_keys`) and never from a global generator. A model's dropout,
initial weights and so on come from these. They are seeded by key before each use, so that what a model
draws does not depend on what was drawn before.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .random_keys import torch_seed

_CPU = torch.device("cpu")
_TRIALS = 20
_REPEATS = 2  # of a state before it is believed: one more draw by another thread may also happen twice
_QUIET_SECONDS = 0.01
_WITH_GENERATOR = {
    "default": "generator",
    "low": "low_generator",
    "names": "generator_with_names",
    "out": "generator_out",
    "low_out": "low_generator_out",
}
"""For an operation that takes no generator, the name of its variant that does."""
_ONLY_CPU = not (
    torch.version.cuda or torch.version.hip or torch.version.xpu or torch.backends.mps.is_built()
)
"""Whether this build of torch knows no other device that a run can use."""


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, those of all devices.

    `torch.manual_seed` takes half a millisecond, because it keeps a formatted stack for each kind of device
    that is not in use yet. A build for CPUs has no such devices.
    """
    if _ONLY_CPU:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def seed_generators(*key: int | str) -> None:
    """Seed all global generators by a key. torch's gets `torch_seed(*key)`, on every device."""
    seed_torch(torch_seed(*key))
    random.seed(torch_seed(*key, "python"))
    seed = torch_seed(*key, "numpy")
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def generator_states(device: torch.device = _CPU) -> dict[str, Any]:
    """Return the states of the global generators, by name: torch's is that of the CPU and of `device`."""
    numpy = np.random.get_state(legacy=False)
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": (numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["has_gauss"]),
        "Python": random.getstate(),
    }
    if device.type != "cpu":
        states["torch"] += torch.get_device_module(device).get_rng_state(device).numpy().tobytes()
    return states


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the global generators afterwards. Inside, NumPy's is of the kind that can be seeded."""
    python, bits = random.getstate(), np.random.mtrand.get_bit_generator()
    numpy = np.random.get_state(legacy=False)
    np.random.mtrand.set_bit_generator(np.random.MT19937())
    try:
        with same_torch_state():
            yield
    finally:
        random.setstate(python)
        np.random.mtrand.set_bit_generator(bits)
        np.random.set_state(numpy)  # with the half of a pair of normal numbers that it keeps


@contextmanager
def same_torch_state(device: torch.device | None = None) -> Iterator[None]:
    """Restore torch's generators afterwards: the CPU's, and that of `device` or the current GPU.

    A GPU that nobody has used yet stays untouched, because a process that has used one cannot be forked.
    """
    kind = "cuda" if device is None or device.type == "cpu" else device.type
    devices = [device] if device is not None and device.type != "cpu" else []
    if device is None and torch.cuda.is_initialized():
        devices = [torch.device("cuda", torch.cuda.current_device())]
    with torch.random.fork_rng(devices, device_type=kind):
        yield


def drawn_from(compute: Callable[[], Any], device: torch.device, *key: int | str) -> tuple[str, ...] | None:
    """Return the names of the global generators from which `compute` draws.

    Other threads may draw at the same time. A generator that keeps its state in one call was not used. One
    that is left in the same new state again and again, while nobody draws in between, was used. torch's was
    also used if `PrivateDraws` sees it. Returns None if nothing of this was seen in many calls.
    """
    repeats: dict[str, int] = {}
    used: dict[str, bool] = {}
    after: dict[str, Any] = {}
    for _ in range(_TRIALS):
        seed_generators(*key)
        before, earlier = generator_states(device), after
        compute()
        after = generator_states(device)
        used = {name: False for name in after if after[name] == before[name]} | used
        if "torch" not in used and own_torch_state(compute, *key)[0]:
            used["torch"] = True
        if len(used) < len(after):
            quiet = _quiet_generators(after, device)
            for name, state in after.items():
                repeated = quiet[name] and state == earlier.get(name)
                repeats[name] = repeats.get(name, 0) + 1 if repeated else 0
            used = {name: True for name in after if repeats[name] >= _REPEATS} | used
        if len(used) == len(after):
            return tuple(name for name in after if used[name])
    return None


def _quiet_generators(states: dict[str, Any], device: torch.device = _CPU) -> dict[str, bool]:
    """Return for each generator whether nobody drew from it while this thread slept for a moment."""
    time.sleep(_QUIET_SECONDS)
    now = generator_states(device)
    return {name: now[name] == state for name, state in states.items()}


class ModelDraws:
    """Notices whether another thread drew from the global generators during a model's forward pass.

    A model usually draws as many numbers for each shard of a size. Each generator is a Mersenne Twister,
    whose state has a position, the count of its draws modulo 624. A position that was not seen before for
    this size is believed only if the pass ends in the same state with a private generator, or, as that can
    be had for torch only, if it ends in the same states again and again while nobody draws in between.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        """The generators that the model draws from, see `generator_states`."""
        self._known: set[tuple[Any, ...]] = set()
        self._before: list[Any] = []
        self._repeats = 0

    def were_own(self, size: int, own_state: Callable[[], Any]) -> bool:
        """Return whether a pass over `size` images may be used. If not, repeat it, seeded as before.

        `own_state` returns torch's state after the same pass with a private generator.
        """
        every = generator_states()
        states = [every[name] for name in self.names]
        positions = (size, *(_position(name, every[name]) for name in self.names))
        if positions in self._known:
            return True
        if self.names == ("torch",):
            with same_torch_state():  # the backward pass may draw too, and goes on from here
                is_own = own_state() == every["torch"]
            if is_own:
                self._known.add(positions)
                return True
        quiet = _quiet_generators(every)
        repeated = states == self._before and all(quiet[name] for name in self.names)
        self._before, self._repeats = states, self._repeats + 1 if repeated else 0
        if self._repeats < _REPEATS:
            return False
        self._known.add(positions)
        return True


def _position(name: str, state: Any) -> Any:
    """Return the position of a Mersenne Twister, from an entry of `generator_states`."""
    if name == "torch":
        return state[8:24]  # `left` and `next`, in front of its words
    return state[1] if name == "NumPy" else state[1][-1]


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation of torch in this thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would import its compiler to keep it away, which takes more than a second."""
        return False


class PrivateDraws(DispatchMode):
    """Draws on the CPU as if torch's global generator had this seed, but from a generator of its own.

    So another thread that draws from the global one changes nothing. Code that seeds the global generator
    anew draws from that. It does not support code that restores the global generator's state, as
    `torch.utils.checkpoint` does in the backward pass. So no pass that is used runs in it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.drew = False
        """Whether any operation drew random numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, draws = kwargs or {}, torch.Tag.nondeterministic_seeded in func.tags
        self.drew = self.drew or draws
        if draws and torch.initial_seed() == self._seed and self._is_on_cpu(args, kwargs):
            variant = _variant_with_generator(func)
            if variant is not None:
                return variant(*args, **{**kwargs, "generator": kwargs.get("generator") or self.generator})
        return func(*args, **kwargs)

    @staticmethod
    def _is_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensor = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None
        )
        device = kwargs.get("device") or (tensor.device if tensor is not None else "cpu")
        return torch.device(device).type == "cpu"


class DrawsNotShared(Exception):
    """A pass of several shards draws random numbers in a way that cannot be cut into shards."""


class ShardDraws(DispatchMode):
    """In a pass of several shards on the CPU, draws for each what it would draw in a pass of its own.

    `seeds` are those of torch's global generator in the shards' own passes, `sizes` the numbers of their
    samples. What is drawn must have as many rows as the pass has samples, or a multiple of it, as a dropout
    mask has. Raises `DrawsNotShared` otherwise.
    """

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__()
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._sizes, self._samples = sizes, sum(sizes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        with_generator = _variant_with_generator(func)
        drawn = args[0] if args else None
        if (
            with_generator is None
            or kwargs.get("generator")
            or not isinstance(drawn, torch.Tensor)
            or any(isinstance(other, torch.Tensor) for other in (*args[1:], *kwargs.values()))
            or drawn.device.type != "cpu"
            or drawn.ndim == 0
            or len(drawn) % self._samples
        ):
            raise DrawsNotShared
        rows = [size * (len(drawn) // self._samples) for size in self._sizes]
        parts = [
            with_generator(part, *args[1:], **{**kwargs, "generator": generator})
            for part, generator in zip(drawn.split(rows), self._generators, strict=True)
        ]
        return drawn if func._schema.is_mutable else torch.cat(parts)


def _variant_with_generator(func: Any) -> Any:
    """Return the variant of an operation that takes a generator; None if there is none."""
    if not any(argument.name == "generator" for argument in func._schema.arguments):
        func = getattr(func.overloadpacket, _WITH_GENERATOR.get(func._overloadname, ""), None)
    has_it = func is not None and any(argument.name == "generator" for argument in func._schema.arguments)
    return func if has_it else None


def own_torch_state(compute: Callable[[], Any], *key: int | str) -> tuple[bool, bytes]:
    """Return whether `compute` draws with torch, and torch's state afterwards if nobody else draws.

    The global generators are seeded by `key` first.
    """
    seed_generators(*key)
    with PrivateDraws(torch_seed(*key)) as private:
        compute()
    return private.drew, private.generator.get_state().numpy().tobytes()
