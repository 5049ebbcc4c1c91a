"""The content of the JSON files in a run's folder, as types. `run_files` checks each file against its type.

Unless a comment says otherwise, a file may have further fields, which nothing reads.
"""

import base64
import binascii
import re
from typing import Annotated, Any, NotRequired, TypedDict

from .checked_json import Rule

# ---- Types of values -------------------------------------------------------------------------------------


def _between(low: float, high: float) -> Rule:
    return Rule(f"be from {low:g} to {high:g}", lambda value: low <= value <= high)


def _is_picture(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == 28 * 28
    except (binascii.Error, ValueError):
        return False


_NOT_EMPTY = Rule("not be empty", bool)
Count = Annotated[int, _between(0, 2**63 - 1)]
Positive = Annotated[int, _between(1, 2**63 - 1)]
Share = Annotated[float, _between(0, 1)]
Amount = Annotated[float, _between(0, 1e100)]
Time = Annotated[float, _between(0, 250_000_000_000)]
"""Seconds since 1970, up to about the year 9900."""
Epoch = Annotated[float, _between(1e-9, 1e9)]
Sha256 = Annotated[str, Rule("have 64 hexadecimal digits", re.compile("[0-9a-f]{64}").fullmatch)]
Picture = Annotated[str, Rule("be 28 by 28 bytes in base64", _is_picture)]
StepSeconds = Annotated[float, _between(-1, 1e9)]
"""Seconds per step: a difference of two clocks, which rounding can make slightly negative."""
Matrix = Annotated[
    list[list[Count]],
    _NOT_EMPTY,
    Rule("be square", lambda rows: all(len(row) == len(rows) for row in rows)),
]
Scalar = str | int | float | bool | None

# ---- Types of files --------------------------------------------------------------------------------------


class DatasetFields(TypedDict):
    """The data set in `config.json`."""

    name: str
    class_names: list[str]
    mean: float
    std: float
    sha256: Sha256
    source: NotRequired[str]


class ConfigFields(TypedDict):
    """`config.json`."""

    recipe: dict[str, Scalar]
    run: dict[str, Scalar]
    dataset: NotRequired[DatasetFields]
    versions: NotRequired[dict[str, str]]
    content_sha256: NotRequired[Sha256]
    """The digest of all other fields. Earlier versions did not write it."""


class ResultFields(TypedDict):
    """`result.json` of a run, and the `result` of its `end` event."""

    dataset: str
    model: str
    epochs: Count
    steps: Count
    test_accuracy: Share
    test_loss: float
    test_images: Count
    weights_sha256: Sha256
    samples_sha256: Sha256
    data_sha256: Sha256
    train_seconds: Amount
    world_size: Positive
    images_per_second: Amount | None
    out: str
    sync: NotRequired[str]
    device: NotRequired[str]
    steps_here: NotRequired[Count]
    seconds_here: NotRequired[Amount]
    total_seconds: NotRequired[Amount]


Result = Annotated[
    ResultFields,
    Rule(
        "have both steps_here and seconds_here, or neither",
        lambda r: ("steps_here" in r) == ("seconds_here" in r),
    ),
]


class ScoreFields(TypedDict):
    """`result.json` of a run or an ensemble, as far as `dmnist export` reads it."""

    weights_sha256: NotRequired[str]
    test_accuracy: NotRequired[Share]


class MemberFields(TypedDict):
    """A network of an ensemble, in `result.json` of the ensemble."""

    seed: Count
    weights_sha256: Sha256


class EnsembleFields(TypedDict):
    """`result.json` of an ensemble, as far as it is read."""

    members: Annotated[list[MemberFields], _NOT_EMPTY]


class MistakeFields(TypedDict):
    """A misclassified image."""

    index: Count
    label: Count
    predicted: Count
    confidence: Share
    image: Picture


class MistakesFields(TypedDict):
    """`mistakes.json`."""

    step: Count
    mistakes: list[MistakeFields]


class GroupFields(TypedDict):
    """`.group`: a random token, the digest of recipe and data, and the launchers' IDs."""

    mark: str
    what: str
    starters: list[str]


# ---- Types of events, the lines of metrics.jsonl ---------------------------------------------------------


class EventFields(TypedDict):
    """What every event has: its kind, and when it was written."""

    event: str
    time: Time


class RankFields(TypedDict):
    """A rank, in a `start` event."""

    rank: Count
    host: str
    pid: Count


class _Start(EventFields):
    lines: dict[str, str]
    world_size: Positive
    step: Count
    steps: Count
    epochs: Count
    again: NotRequired[bool]
    ranks: NotRequired[list[RankFields]]


class _Notice(EventFields):
    text: str


class RankTimes(TypedDict):
    """Seconds per step, by rank."""

    busy: Annotated[list[StepSeconds], _NOT_EMPTY]
    exchange: Annotated[list[StepSeconds], _NOT_EMPTY]


class _Steps(EventFields):
    step: Positive
    epoch: Epoch
    loss: float
    lr: float
    images_per_second: Amount
    seconds: dict[str, StepSeconds]
    first_step: Positive
    losses: Annotated[list[float], _NOT_EMPTY]
    ranks: NotRequired[
        Annotated[
            RankTimes,
            Rule(
                "have as many times in busy as in exchange", lambda r: len(r["busy"]) == len(r["exchange"])
            ),
        ]
    ]


class _Evaluation(EventFields):
    step: Count
    epoch: Annotated[float, _between(0, 1e9)]
    train_loss: float
    train_accuracy: Share
    test_loss: float
    test_accuracy: Share
    test_images: Count
    best: bool
    confusion: NotRequired[Matrix]


class _Checkpoint(EventFields):
    step: Count
    path: str
    seconds: Amount


class _Stop(EventFields):
    step: Count


class _End(EventFields):
    result: Result


EVENTS: dict[str, Any] = {
    "start": _Start,
    "notice": _Notice,
    "steps": Annotated[
        _Steps,
        Rule("have a loss for each step", lambda e: e["first_step"] + len(e["losses"]) == e["step"] + 1),
    ],
    "evaluation": _Evaluation,
    "checkpoint": _Checkpoint,
    "stop": _Stop,
    "end": _End,
}
"""The type of each kind of event."""
