"""What a run is made of, each part from the recipe and the world: threads, model, gradient sums."""

from functools import partial

import torch

from ..common.placement import usable_cores
from ..config import Recipe, Run
from ..data.broadcast import Data
from ..distributed.world import World
from ..errors import UsageError
from ..gradients.all_reduce import DdpGradients, Gradients, TreeGradients
from ..gradients.batch_invariance import same_bits, understood
from ..gradients.per_shard import Layers
from ..gradients.tree_sum import owned_shards
from ..models.zoo import IMAGE_SHAPE, Traits, build, inspect, place
from ..runs.checkpoint import FORMAT, Content, versions
from .batches import shard_sizes
from .evaluate import forward
from .loop import State

TOGETHER = 512
"""Images that go through the model in one pass at most: more would leave the caches and gain nothing."""


def use_threads(world: World, recipe: Recipe) -> int:
    """Set and return this process's intra-op threads.

    In `tree` it is one: two threads would add in another order. In `ddp` the host's cores are divided.
    """
    threads = 1 if recipe.sync == "tree" else max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    if world.device.type == "cuda" and recipe.sync == "tree":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return threads


def oversubscription(world: World, threads: int) -> list[str]:
    """A warning if this host's processes have more threads than cores."""
    wanted, cores = world.local_size * threads, usable_cores()
    if world.device.type != "cpu" or wanted <= cores:
        return []
    return [f"{world.local_size} processes share {cores} cores: same answer, slower than --nproc {cores}"]


def make_model(recipe: Recipe, classes: int, world: World) -> tuple[torch.nn.Module, Traits]:
    """The model on this rank's device, found fit for exact training."""
    model = place(build(recipe.model, classes, recipe.seed), world.device)
    return model, inspect(model, recipe.model, classes, world.device)


def make_gradients(
    recipe: Recipe, options: Run, world: World, model: torch.nn.Module, traits: Traits
) -> Gradients:
    """The recipe's way of adding gradients up. Raises `UsageError` if a shard exceeds `--micro-batch`."""
    if recipe.sync == "ddp" and traits.unused:
        raise UsageError(
            f"--model {recipe.model}: its {traits.unused[0]} is never used; ddp needs all to be"
        )
    shard_size = -(-recipe.batch_size // recipe.shards)
    if options.micro_batch is not None and options.micro_batch < shard_size:
        raise UsageError(
            f"--micro-batch {options.micro_batch}, but a shard has {shard_size} images: use --shards "
            f"{-(-recipe.batch_size // options.micro_batch)} or more"
        )
    if recipe.sync == "tree":
        return make_tree(recipe, world, model, traits)
    return DdpGradients(
        model,
        world,
        recipe.shards,
        shard_size=shard_size,
        one_by_one=traits.draws_random_numbers,
        micro_batch=options.micro_batch,
    )


def make_tree(recipe: Recipe, world: World, model: torch.nn.Module, traits: Traits) -> TreeGradients:
    """Shards one by one, or several in one pass where this machine has been seen to give the same bits."""
    if traits.draws_random_numbers or not understood(model, IMAGE_SHAPE):  # each shard has a key of its own
        return TreeGradients(model, world, recipe.shards)
    owned = owned_shards(world.rank, world.size, recipe.shards)
    sizes = shard_sizes(recipe.batch_size, recipe.shards)[owned.start : owned.stop]
    at_once = max(1, TOGETHER // max(sizes[0], 1))
    runs = sorted({tuple(sizes[i : i + at_once]) for i in range(0, len(sizes), at_once)})
    runs = [run for run in runs if len(run) > 1 and min(run) > 0]
    forward_pass = partial(forward, precision=recipe.precision)
    together = [run for run in runs if same_bits(model, forward_pass, IMAGE_SHAPE, run)]
    return TreeGradients(model, world, recipe.shards, Layers(model), together)


def pack(state: State, recipe: Recipe, data: Data, options: Run, steps_per_epoch: int) -> Content:
    """The checkpoint of this moment."""
    drawn = {"seed": options.data_seed, "train_size": options.train_size, "test_size": options.test_size}
    return {
        "format": FORMAT,
        **state.to_content(),
        "recipe": recipe.to_dict(),
        "dataset": {**data.to_dict(), **(drawn if data.name == "generated" else {})},
        "steps_per_epoch": steps_per_epoch,
        "versions": versions(),
    }
