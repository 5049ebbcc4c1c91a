"""Run shards of a global batch through a model, with keyed random numbers, up to the loss's gradient."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..common.generators import (
    ShardDraws,
    drawn_from,
    generator_states,
    own_torch_state,
    seed_generators,
)
from ..common.random_keys import torch_seed
from ..errors import TrainingError, UsageError
from ..exact.module import ExactModule
from ..gradients.shard_gradients import ForwardShards
from ..models.build import forward
from ..models.running_statistics import running_statistics
from .batches import Batch
from .ledger import Ledger
from .state import TrainingContext
from .sync_points import PhaseTimer

_TRIES = 20


def make_forward(
    context: TrainingContext, timer: PhaseTimer, step: int, ledger: Ledger | None = None
) -> ForwardShards:
    """Return the function that runs shards of global batch `step` through a model.

    With `ledger`, it records the samples. A pass that is repeated replaces its record.
    """
    size, sizes, recorded = context.batches.size(step), context.batches.shard_sizes(step), 0
    run = exact_forward if context.recipe.precision == "exact" else keyed_forward
    divisor = torch.full((), float(size), device=context.world.device)  # a GPU multiplies by 1 / number

    def forward_shards(module: nn.Module, shards: range) -> tuple[Tensor, Tensor]:
        nonlocal recorded
        batch, logits = run(module, context, timer, step, shards)
        with timer.phase("forward"):
            of_shards = sizes[shards.start : shards.stop]
            losses, grad_logits = context.loss(logits, batch.labels, of_shards)
        if ledger is not None and not (isinstance(module, ExactModule) and module.is_trial):
            if batch.start < recorded:
                ledger.take_back(batch.start)
            ledger.record(batch, losses, logits)
            recorded = batch.start + len(batch.ids)
        return logits, grad_logits.div_(divisor)

    return forward_shards


def exact_forward(
    module: nn.Module, context: TrainingContext, timer: PhaseTimer, step: int, samples: range
) -> tuple[Batch, Tensor]:
    """Run samples of global batch `step` through an `ExactModule`, whose dropout is keyed by sample."""
    with timer.phase("data"):
        batch = context.batches.take(step, samples)
    context.world.status.made_progress()
    if isinstance(module, ExactModule):
        module.key_draws("dropout", context.recipe.seed, step, first=samples.start)
    with timer.phase("forward"):
        logits = forward(module, batch.images, "exact")
    return batch, logits


def keyed_forward(
    module: nn.Module, context: TrainingContext, timer: PhaseTimer, step: int, shards: range
) -> tuple[Batch, Tensor]:
    """Run shards through the module, with what it draws keyed by seed, step and shard.

    A pass of several shards draws from private generators. Raises `DrawsNotShared` if it cannot. In a pass
    of one shard the model draws from the global ones.
    The pass is repeated if another thread drew from the same global generators meanwhile. Raises
    `TrainingError` if that happens again and again.
    """
    draws, recipe = context.draws, context.recipe
    one_pass_only = recipe.sync == "ddp" and context.world.size > 1  # DDP may communicate in a forward pass
    shared = draws is not None and len(shards) > 1 and recipe.sync == "tree"
    watched = ":" in recipe.model and not one_pass_only and (shared or not draws)
    key, device = ("noise", recipe.seed, step, shards.start), context.world.device

    start: dict[str, Tensor] = {}
    if watched or draws:  # the pass may be repeated
        start = {name: buffer.clone() for name, buffer in running_statistics(module).items()}

    def again() -> Tensor:
        images = context.batches.take(step, shards).images
        values = {name: value.clone() for name, value in start.items()}
        apart = partial(functional_call, module, values) if values else module
        with torch.no_grad():
            return forward(apart, images, recipe.precision)

    def own_state() -> bytes:
        return own_torch_state(again, *key)[1]

    before = generator_states(device) if watched else {}
    if shared:
        with timer.phase("data"):
            batch = context.batches.take(step, shards)
        context.world.status.made_progress()
        seeds = [torch_seed("noise", recipe.seed, step, shard) for shard in shards]
        sizes = context.batches.shard_sizes(step)[shards.start : shards.stop]
        with timer.phase("forward"), ShardDraws(seeds, sizes):
            logits = forward(module, batch.images, recipe.precision)
        if watched and generator_states(device) != before:
            _refuse_draws(context, again, *key)
        return batch, logits
    for attempt in range(_TRIES):
        if attempt:
            for name, buffer in running_statistics(module).items():
                buffer.copy_(start[name])
        with timer.phase("data"):
            batch = context.batches.take(step, shards)
        if draws:
            seed_generators(*key)
        context.world.status.made_progress()
        with timer.phase("forward"):
            logits = forward(module, batch.images, recipe.precision)
        if watched and generator_states(device) != before:
            _refuse_draws(context, again, *key)
        if not draws or one_pass_only or draws.were_own(len(batch.images), own_state):
            return batch, logits
    assert draws
    names = " and ".join(draws.names)
    error = TrainingError(
        f"the model draws different numbers from {names}'s global generator when a pass is repeated: "
        "either another thread draws from it too (train in a separate process), or the model keeps state"
    )
    error.on_one_rank = True
    raise error


def _refuse_draws(context: TrainingContext, again: Callable[[], Tensor], *key: int | str) -> None:
    """Raise `UsageError` if a pass draws from a generator from which the model did not when it was tested.

    Several shards may share such a pass, so the numbers would depend on the number of processes. `again`
    repeats the pass. If another thread has drawn the numbers, this does nothing.
    """
    expected = context.draws.names if context.draws else ()
    drawn = drawn_from(again, context.world.device, *key) or ()
    if names := [name for name in drawn if name not in expected]:
        error = UsageError(
            f"--model {context.recipe.model}: it draws random numbers from {' and '.join(names)}'s global "
            "generator for some images only, and not when it was tested: draw as many for every image"
        )
        error.on_one_rank = True
        raise error
