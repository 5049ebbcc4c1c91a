"""Build the parts of a run from the recipe and the world: threads, model, gradients, checkpoint."""

from functools import partial

import torch

from ..common.placement import usable_cores
from ..config import Recipe, Run
from ..data.broadcast import Data
from ..distributed.world import World
from ..errors import UsageError
from ..gradients.all_reduce import DdpGradients, Gradients, TreeGradients
from ..gradients.batch_invariance import is_batch_invariant, matches_autograd
from ..gradients.per_shard import HookedLayers
from ..gradients.tree_sum import owned_shards
from ..models.zoo import IMAGE_SHAPE, ModelProperties, build, inspect, place
from ..runs.checkpoint import FORMAT, Content, versions
from .batches import shard_sizes
from .evaluate import forward
from .state import State

MAX_IMAGES_PER_PASS = 512
"""The most images that go through the model in one pass: more would not fit the caches and gain nothing."""


def use_threads(world: World, recipe: Recipe) -> int:
    """Set and return the number of intra-op threads of this process.

    With `tree` it is one, because two threads would add in another order. With `ddp` the processes of a
    host share its cores.
    """
    threads = 1 if recipe.sync == "tree" else max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    if world.device.type == "cuda" and recipe.sync == "tree":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return threads


def oversubscription_warnings(world: World, threads: int) -> list[str]:
    """Return a warning if this host's processes have more threads than cores, else nothing."""
    wanted, cores = world.local_size * threads, usable_cores()
    if world.device.type != "cpu" or wanted <= cores:
        return []
    return [f"{world.local_size} processes share {cores} cores: same answer, slower than --nproc {cores}"]


def make_model(recipe: Recipe, classes: int, world: World) -> tuple[torch.nn.Module, ModelProperties]:
    """Build the model on this rank's device. Raises `UsageError` if it cannot be trained exactly."""
    model = place(build(recipe.model, classes, recipe.seed), world.device)
    return model, inspect(model, recipe.model, classes, world.device)


def make_gradients(
    recipe: Recipe, options: Run, world: World, model: torch.nn.Module, properties: ModelProperties
) -> Gradients:
    """Make the recipe's way to add gradients.

    Raises `UsageError` if a shard has more images than `--micro-batch`, or if `ddp` is asked for and the
    logits do not depend on some parameter.
    """
    if recipe.sync == "ddp" and properties.unused:
        raise UsageError(
            f"--model {recipe.model}: its {properties.unused[0]} is never used, but ddp needs all to be"
        )
    shard_size = -(-recipe.batch_size // recipe.shards)
    if options.micro_batch is not None and options.micro_batch < shard_size:
        raise UsageError(
            f"--micro-batch {options.micro_batch}, but a shard has {shard_size} images: use --shards "
            f"{-(-recipe.batch_size // options.micro_batch)} or more"
        )
    if recipe.sync == "tree":
        return make_tree_gradients(recipe, world, model, properties)
    return DdpGradients(
        model,
        world,
        recipe.shards,
        shard_size=shard_size,
        one_shard_per_pass=properties.draws_random_numbers,
        micro_batch=options.micro_batch,
    )


def make_tree_gradients(
    recipe: Recipe, world: World, model: torch.nn.Module, properties: ModelProperties
) -> TreeGradients:
    """Make gradients that are added in the fixed tree.

    Several shards share a forward pass where a test on this machine shows that each gets the bits that it
    gets alone. Otherwise, and for a model that draws random numbers by a key per shard, there is one shard
    per pass.
    """
    if properties.draws_random_numbers or not matches_autograd(model, IMAGE_SHAPE):
        return TreeGradients(model, world, recipe.shards)
    owned = owned_shards(world.rank, world.size, recipe.shards)
    sizes = shard_sizes(recipe.batch_size, recipe.shards)[owned.start : owned.stop]
    per_pass = max(1, MAX_IMAGES_PER_PASS // max(sizes[0], 1))
    groups = sorted({tuple(sizes[i : i + per_pass]) for i in range(0, len(sizes), per_pass)})
    groups = [group for group in groups if len(group) > 1 and min(group) > 0]
    forward_pass = partial(forward, precision=recipe.precision)
    invariant = [group for group in groups if is_batch_invariant(model, forward_pass, IMAGE_SHAPE, group)]
    return TreeGradients(model, world, recipe.shards, HookedLayers(model), invariant)


def pack(state: State, recipe: Recipe, data: Data, options: Run, steps_per_epoch: int) -> Content:
    """Return the content of a checkpoint of the present state."""
    drawn = {"seed": options.data_seed, "train_size": options.train_size, "test_size": options.test_size}
    return {
        "format": FORMAT,
        **state.to_content(),
        "recipe": recipe.to_dict(),
        "dataset": {**data.to_dict(), **(drawn if data.name == "generated" else {})},
        "steps_per_epoch": steps_per_epoch,
        "versions": versions(),
    }
