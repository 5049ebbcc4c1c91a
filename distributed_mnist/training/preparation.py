"""Prepare a run: all that comes before its folder is opened. A dry run ends here."""

from collections.abc import Callable
from dataclasses import dataclass

from ..common.generators import ModelDraws
from ..config import Recipe, Run, flag
from ..data.broadcast import Data, broadcast_dataset
from ..data.datasets import Dataset
from ..distributed.world import World
from ..exact.scales import Scales
from ..gradients.exact.parts import Parts
from ..gradients.interface import Gradients
from ..gradients.loss import Loss, make_loss
from ..gradients.setup import make_exact_gradients, make_gradients
from ..models.build import make_model
from ..models.factory import find_factory
from ..models.inspection import ModelProperties
from ..optim.schedule import make_optimizer
from ..user_code.functions import find
from .batches import Batches
from .platforms import agree_on_platform, use_threads
from .resume import read_requested_checkpoint, with_kept_precision
from .state import State
from .step.captured_step import can_capture


@dataclass(frozen=True)
class Preparation:
    """What a run on this rank consists of."""

    title: str
    """The recipe's name in messages."""
    recipe: Recipe
    """With the precision that was chosen."""
    options: Run
    requested: bytes | None
    """The checkpoint that `--resume` names."""
    data: Data
    batches: Batches
    state: State
    """The state before the first step."""
    properties: ModelProperties
    draws: ModelDraws | None
    """What the model draws from global generators; None if it draws nothing."""
    loss: Loss
    gradients: Gradients
    parts: Parts | None
    """The ranks' parts of a batch in exact arithmetic; None in other precisions."""
    captured: bool
    """Whether to capture steps as graphs."""
    threads: int
    """Number of intra-op threads of this process."""
    notices: list[str]
    """What the user should know about the platform."""


def prepare(
    world: World, recipe: Recipe, options: Run, title: str, read: Callable[[], Dataset]
) -> Preparation:
    """Check the settings, load the data, and make the model. Every rank must call it.

    `read` returns the data set and is called on rank 0 only. Raises subclasses of `DmnistError`.
    """
    recipe.check_size(world.size)
    # Cheap checks come first: reading the data takes long.
    world.on_every_rank(lambda: find_functions(recipe))
    requested = read_requested_checkpoint(world, options)
    if recipe.precision == "auto":
        recipe = with_kept_precision(world, recipe, options, requested)
    recipe, notices = agree_on_platform(world, recipe)
    threads = use_threads(world, recipe)  # after a user's module is imported, which may set them too
    data = broadcast_dataset(world, read).with_validation(recipe)
    batches = Batches(data.train, recipe, data.mean, data.std)
    state, properties = make_state(world, recipe, data)
    loss = world.on_every_rank(lambda: make_loss(recipe, len(data.class_names), world.device))
    captured, problem = can_capture(world, recipe, options, properties.draws_from)
    if state.scales is not None:
        parts = Parts(world.size, balance=batches.size(0) if options.balance == "auto" else None)
        gradients: Gradients = make_exact_gradients(
            recipe, options, world, state.model, properties, state.scales, parts, batches.size(0)
        )
    else:
        parts = None
        smallest = batches.smallest_size()
        gradients = make_gradients(
            recipe, options, world, state.model, properties, smallest, captured=captured
        )
    return Preparation(
        title=title,
        recipe=recipe,
        options=options,
        requested=requested,
        data=data,
        batches=batches,
        state=state,
        properties=properties,
        draws=ModelDraws(properties.draws_from) if properties.draws_from else None,
        loss=loss,
        gradients=gradients,
        parts=parts,
        captured=captured,
        threads=threads,
        notices=[*notices, *problem],
    )


def find_functions(recipe: Recipe) -> None:
    """Import the user's own functions. Raises `UsageError` if there is no function of a name."""
    find_factory(recipe.model)
    for field, name in recipe.code().items():
        find(flag(field), name)


def make_state(world: World, recipe: Recipe, data: Data) -> tuple[State, ModelProperties]:
    """Make the model with random weights, and the optimizer. Return also the model's properties."""
    classes, shape = len(data.class_names), data.image_shape
    model, properties = world.on_every_rank(lambda: make_model(recipe, classes, world.device, shape))
    optimizer = world.on_every_rank(lambda: make_optimizer(recipe, model, world))
    scales = Scales(world.device) if recipe.precision == "exact" else None
    return State(model, optimizer, scales), properties
