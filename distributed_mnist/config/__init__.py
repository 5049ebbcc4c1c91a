"""Settings of a run: `Recipe` decides the weights; `Run` says which data, where and how.

Both are frozen and validated when they are created, so the rest of the program need not check them. The
docstrings of both classes and of their fields are the help texts of the command line. `__post_init__`
documents what is raised.
"""

from .fields import flag, require, require_count
from .image_shape import MNIST_SHAPE, ImageShape, describe_shape, shape_of, stored_shape
from .intervals import checkpoint_interval, steps_between
from .recipe import UNUSED_IN_EXACT, Precision, Recipe, Schedule, Sync
from .recipe_files import load_recipe, recipe_names
from .run import DATA_OPTIONS, Device, Run

__all__ = [
    "DATA_OPTIONS",
    "MNIST_SHAPE",
    "UNUSED_IN_EXACT",
    "Device",
    "ImageShape",
    "Precision",
    "Recipe",
    "Run",
    "Schedule",
    "Sync",
    "checkpoint_interval",
    "describe_shape",
    "flag",
    "load_recipe",
    "recipe_names",
    "require",
    "require_count",
    "shape_of",
    "steps_between",
    "stored_shape",
]
