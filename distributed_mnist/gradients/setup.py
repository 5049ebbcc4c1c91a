"""Make the gradient computation of a recipe: which way to add, and how many shards share a forward pass."""

import copy
from functools import partial

from torch import nn

from ..config import Recipe, Run
from ..distributed.world import World
from ..errors import UsageError
from ..exact.scales import Scales
from ..models.build import forward
from ..models.inspection import ModelProperties
from ..models.running_statistics import running_statistics
from .batch_invariance import is_batch_invariant, matches_autograd
from .ddp import DdpGradients
from .exact.integer_sum import ExactGradients
from .exact.parts import Parts
from .exact.trial import require_exact_form
from .interface import Gradients
from .per_shard import HookedLayers
from .tree import TreeGradients
from .tree_sum import owned_shards, shard_sizes

MAX_IMAGES_PER_PASS = 512
"""The most images that go through the model in one pass: more would not fit the caches and gain nothing."""


def make_gradients(
    recipe: Recipe,
    options: Run,
    world: World,
    model: nn.Module,
    properties: ModelProperties,
    smallest_batch: int | None = None,
    *,
    captured: bool = False,
) -> Gradients:
    """Make the recipe's way to add gradients.

    `smallest_batch` is the number of images in the run's smallest batch, by default `--batch-size`.
    `captured` is whether the device captures steps as graphs.
    Raises `UsageError` if a shard has more images than `--micro-batch`, or if `ddp` is asked for and the
    logits do not depend on some parameter or a layer uses batch statistics, or if `ema` is and a layer
    keeps running statistics, or if a shard has one image and batch norm needs more.
    """
    if recipe.sync == "ddp" and properties.statistics_layers:
        raise UsageError(
            f"--model {recipe.model}: with --sync ddp the batch statistics of its layer "
            f"{properties.statistics_layers[0]} would depend on the number of processes: use --sync tree, "
            "with which they are those of a shard"
        )
    if recipe.sync == "ddp" and properties.unused:
        raise UsageError(
            f"--model {recipe.model}: its {properties.unused[0]} is never used, but "
            "ddp needs every parameter to be used"
        )
    if recipe.ema and running_statistics(model):
        raise UsageError(
            f"--model {recipe.model}: with --ema the running statistics of its layer "
            f"{properties.statistics_layers[0]} would not fit the averaged weights: use --average"
        )
    images = recipe.batch_size if smallest_batch is None else smallest_batch
    if max(1, images // recipe.shards) < properties.min_images:
        last = " (the last of an epoch)" if images < recipe.batch_size else ""
        raise UsageError(
            f"--model {recipe.model}: a batch of {images}{last} cut into {recipe.shards} shards leaves one "
            "image in a shard, but batch norm needs two or more: use another --batch-size or fewer --shards"
        )
    shard_size = -(-recipe.batch_size // recipe.shards)
    if options.micro_batch is not None and options.micro_batch < shard_size:
        raise UsageError(
            f"--micro-batch {options.micro_batch}, but a shard has {shard_size} images: use --shards "
            f"{-(-recipe.batch_size // options.micro_batch)} or more"
        )
    if recipe.sync == "tree":
        return make_tree_gradients(recipe, world, model, properties)
    per_pass = options.micro_batch // shard_size if options.micro_batch else recipe.shards
    if properties.draws_random_numbers:  # so that dropout masks do not depend on the number of processes
        per_pass = 1
    return DdpGradients(
        model,
        world,
        recipe.shards,
        per_pass,
        properties.image_shape,
        captured=captured,
        name=recipe.model,
        tolerance=_tolerance(recipe, world),
    )


def make_exact_gradients(
    recipe: Recipe,
    options: Run,
    world: World,
    model: nn.Module,
    properties: ModelProperties,
    scales: Scales,
    parts: Parts,
    largest_batch: int,
) -> ExactGradients:
    """Make gradients in exact arithmetic. `largest_batch` is the number of images in the largest batch.

    Raises `UsageError` if the model draws random numbers other than torch's, which dropout uses, if one of
    its layers has no exact form, or if the sums over a batch may be too long to be exact.
    """
    if others := [name for name in properties.draws_from if name != "torch"]:
        raise UsageError(
            f"--model {recipe.model}: with --precision exact it cannot draw random numbers from {others[0]}"
        )
    shape = properties.image_shape
    world.on_every_rank(lambda: require_exact_form(model, recipe.model, world.device, shape, largest_batch))
    return ExactGradients(model, world, scales, parts, per_pass=options.micro_batch, name=recipe.model)


def make_tree_gradients(
    recipe: Recipe, world: World, model: nn.Module, properties: ModelProperties
) -> TreeGradients:
    """Make gradients that are added in the fixed tree.

    Several shards share a forward pass if a test on this machine shows that each shard gets the same bits
    as in a pass of its own, with the same random numbers (see `ShardDraws`). Otherwise there is one shard
    per pass. The same is true for a model with batch statistics, which are those of a shard.
    """
    make = partial(
        TreeGradients,
        model,
        world,
        recipe.shards,
        untouched=_copy(model),
        name=recipe.model,
        tolerance=_tolerance(recipe, world),
    )
    shape = properties.image_shape
    may_draw = ((), ("torch",)) if world.device.type == "cpu" else ((),)
    by_shard = bool(properties.statistics_layers) or _has_hooks(model)
    shareable = properties.draws_from in may_draw and not by_shard
    if not shareable or not matches_autograd(model, shape):
        return make()
    owned = owned_shards(world.rank, world.size, recipe.shards)
    sizes = shard_sizes(recipe.batch_size, recipe.shards)[owned.start : owned.stop]
    per_pass = max(1, MAX_IMAGES_PER_PASS // max(sizes[0], 1))
    groups = sorted({tuple(sizes[i : i + per_pass]) for i in range(0, len(sizes), per_pass)})
    groups = [group for group in groups if len(group) > 1 and min(group) > 0]
    forward_pass = partial(forward, precision=recipe.precision)
    invariant = [group for group in groups if is_batch_invariant(model, forward_pass, shape, group)]
    return make(HookedLayers(model), invariant)


def _tolerance(recipe: Recipe, world: World) -> float:
    """Return how much two right gradients may differ, as a fraction of the largest gradient."""
    return 1e-3 if recipe.precision == "fp32" and world.device.type == "cpu" else 5e-2


def _has_hooks(model: nn.Module) -> bool:
    """Return whether a user's hooks may change gradients: only autograd is sure to call them all."""
    return any(parameter._backward_hooks for parameter in model.parameters()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )


def _copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of the model, or None: a user's model may refuse to be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:
        return None
