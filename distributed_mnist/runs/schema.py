"""The content of the JSON files in a run's folder, as types. `run_files` checks each file against its type.

Unless a comment says otherwise, a file may have further fields, which nothing reads. `__post_init__` checks
what a type cannot express. This module does not import torch, because the command line uses it before torch
is imported.
"""

import math
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ..config import MNIST_SHAPE

# ---- Types of values -------------------------------------------------------------------------------------

_LARGEST_INT = 2**63 - 1
Count = Annotated[int, Meta(ge=0, le=_LARGEST_INT)]
Positive = Annotated[int, Meta(ge=1, le=_LARGEST_INT)]
Number = Annotated[float, Meta(gt=-1e100, lt=1e100)]
"""A larger number is damage. Sums and products of smaller ones stay finite."""
Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=1e100)]
Time = Annotated[float, Meta(ge=0, le=250_000_000_000)]
"""Seconds since 1970, up to about the year 9900."""
Epoch = Annotated[float, Meta(ge=1e-9, le=1e9)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]  # `$` admits a line end
Shape = tuple[Positive, Positive, Positive]
"""Channels, height and width of an image."""
StepSeconds = Annotated[float, Meta(ge=-1, le=1e9)]
"""Seconds per step: a difference of two clocks, which rounding can make slightly negative."""
Scalar = str | int | Number | bool | None

# ---- Types of files --------------------------------------------------------------------------------------


class DatasetFields(Struct):
    """The data set in `config.json`."""

    name: str
    class_names: list[str]
    mean: Number
    std: Number
    sha256: Sha256
    image_shape: Shape | UnsetType = UNSET
    """Earlier versions did not write it."""
    source: str | UnsetType = UNSET


class ConfigFields(Struct):
    """`config.json`, which has no further fields."""

    recipe: dict[str, Scalar]
    run: dict[str, Scalar]
    dataset: DatasetFields | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    content_sha256: Sha256 | UnsetType = UNSET
    """The digest of all other fields. Earlier versions did not write it."""


class ResultFields(Struct):
    """`result.json` of a run, and the `result` of its `end` event."""

    dataset: str
    model: str
    epochs: Count
    steps: Count
    test_accuracy: Share
    test_loss: Number
    test_images: Count
    weights_sha256: Sha256
    samples_sha256: Sha256
    data_sha256: Sha256
    train_seconds: Amount
    world_size: Positive
    images_per_second: Amount | None
    out: str
    best_step: Count | UnsetType = UNSET
    validation_accuracy: Share | UnsetType = UNSET
    validation_images: Count | UnsetType = UNSET
    sync: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    steps_here: Count | UnsetType = UNSET
    seconds_here: Amount | UnsetType = UNSET
    total_seconds: Amount | UnsetType = UNSET

    def __post_init__(self) -> None:
        if (self.steps_here is UNSET) != (self.seconds_here is UNSET):
            raise ValueError("Expected both `steps_here` and `seconds_here`, or neither")
        chosen = (self.best_step, self.validation_accuracy, self.validation_images)
        if len({value is UNSET for value in chosen}) > 1:
            raise ValueError("Expected `best_step` and the validation fields, or none of them")


class ScoreFields(Struct):
    """`result.json` of a run or an ensemble, as far as `dmnist export` reads it."""

    weights_sha256: str | UnsetType = UNSET
    test_accuracy: Share | UnsetType = UNSET


class MemberFields(Struct):
    """A network of an ensemble, in `result.json` of the ensemble."""

    seed: Count
    weights_sha256: Sha256


class EnsembleFields(Struct):
    """`result.json` of an ensemble, as far as it is read."""

    members: Annotated[list[MemberFields], Meta(min_length=1)]


class MistakeFields(Struct):
    """A misclassified image."""

    index: Count
    label: Count
    predicted: Count
    confidence: Share
    image: bytes
    """The pixels `(h, w)`, or in colour `(h, w, 3)`, in base64 in the file."""


class MistakesFields(Struct):
    """`mistakes.json`."""

    step: Count
    mistakes: list[MistakeFields]
    images: Literal["test", "validation"] = "test"
    """Earlier versions had no other."""
    image_shape: Shape = MNIST_SHAPE
    """Earlier versions did not write it."""

    def __post_init__(self) -> None:
        if self.image_shape[0] not in (1, 3):
            raise ValueError("Expected 1 or 3 channels in `image_shape`")
        if any(len(mistake.image) != math.prod(self.image_shape) for mistake in self.mistakes):
            raise ValueError("Expected images of the shape in `image_shape`")


class GroupFields(Struct):
    """`.group`: a random token, the digest of recipe and data, and the launchers' IDs."""

    mark: str
    what: str
    starters: list[str]


# ---- Types of events, the lines of metrics.jsonl ---------------------------------------------------------


class _Event(Struct, tag_field="event"):
    """What every event has: its kind, and when it was written."""

    time: Time


class RankFields(Struct):
    """A rank, in a `start` event."""

    rank: Count
    host: str
    pid: Count
    device: str | UnsetType = UNSET


class _Start(_Event, tag="start"):
    lines: dict[str, str]
    world_size: Positive
    step: Count
    steps: Count
    epochs: Count
    again: bool | UnsetType = UNSET
    ranks: list[RankFields] | UnsetType = UNSET


class _Notice(_Event, tag="notice"):
    text: str


class RankTimes(Struct):
    """Seconds per step, by rank."""

    busy: Annotated[list[StepSeconds], Meta(min_length=1)]
    exchange: Annotated[list[StepSeconds], Meta(min_length=1)]
    share: list[Share] | UnsetType = UNSET
    """The fraction of each batch that a rank computes, in exact arithmetic."""

    def __post_init__(self) -> None:
        if self.share is not UNSET and len(self.share) != len(self.busy):
            raise ValueError("Expected as many fractions in `share` as times in `busy`")
        if len(self.busy) != len(self.exchange):
            raise ValueError("Expected as many times in `busy` as in `exchange`")


class _Steps(_Event, tag="steps"):
    step: Positive
    epoch: Epoch
    loss: Number
    lr: Number
    images_per_second: Amount
    seconds: dict[str, StepSeconds]
    first_step: Positive
    losses: Annotated[list[Number], Meta(min_length=1)]
    ranks: RankTimes | UnsetType = UNSET

    def __post_init__(self) -> None:
        if len(self.losses) != self.step - self.first_step + 1:
            raise ValueError("Expected a loss for each step")


Confusion = Annotated[list[list[Count]], Meta(min_length=1)]
Evaluated = Annotated[float, Meta(ge=0, le=1e9)]
"""The epoch of an evaluation."""


class _Evaluation(_Event, tag="evaluation"):
    """Of the test images or of the validation images."""

    step: Count
    epoch: Evaluated
    train_loss: Number
    train_accuracy: Share
    best: bool
    test_loss: Number | UnsetType = UNSET
    test_accuracy: Share | UnsetType = UNSET
    test_images: Count | UnsetType = UNSET
    validation_loss: Number | UnsetType = UNSET
    validation_accuracy: Share | UnsetType = UNSET
    validation_images: Count | UnsetType = UNSET
    confusion: Confusion | UnsetType = UNSET

    def __post_init__(self) -> None:
        test = (self.test_loss, self.test_accuracy, self.test_images)
        validation = (self.validation_loss, self.validation_accuracy, self.validation_images)
        if [UNSET in test, UNSET in validation].count(False) != 1:
            raise ValueError("Expected the scores on the test images or those on the validation images")
        _require_square(self.confusion)


class _Test(_Event, tag="test"):
    """The scores of the result on the test images, if the evaluations before were of validation images."""

    step: Count
    epoch: Evaluated
    test_loss: Number
    test_accuracy: Share
    test_images: Count
    confusion: Confusion

    def __post_init__(self) -> None:
        _require_square(self.confusion)


def _require_square(confusion: Confusion | UnsetType) -> None:
    if confusion and any(len(row) != len(confusion) for row in confusion):
        raise ValueError("Expected a square matrix in `confusion`")


class _Checkpoint(_Event, tag="checkpoint"):
    step: Count
    path: str
    seconds: Amount


class _Stop(_Event, tag="stop"):
    step: Count


class _End(_Event, tag="end"):
    result: ResultFields


Event = _Start | _Notice | _Steps | _Evaluation | _Test | _Checkpoint | _Stop | _End
