"""Parse intervals such as `500`, `2 epochs` and `5 seconds`."""

import re

from ..errors import UsageError
from .fields import flag

_STEPS_OR_EPOCHS = re.compile(r"(\d{1,18})\s*(steps?|epochs?)?")
_DURATION = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*(s|seconds?|min|minutes?)")


def steps_between(text: str, steps_per_epoch: int, name: str) -> int:
    """Return a number of steps: 500 for "500" or "500 steps", twice `steps_per_epoch` for "2 epochs".

    Raises `UsageError`, naming the flag of the field `name`.
    """
    match = _STEPS_OR_EPOCHS.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag(name)} must be like 500 (steps) or '2 epochs', not {text[:99]!r}")
    return int(match[1]) * (steps_per_epoch if (match[2] or "").startswith("epoch") else 1)


def checkpoint_interval(text: str, steps_per_epoch: int) -> tuple[int | None, float | None]:
    """Parse `--checkpoint-every`: (steps, None), or for a duration (None, seconds). Raises `UsageError`."""
    match = _DURATION.fullmatch(text.strip())
    if match and float(match[1]) > 0:
        return None, float(match[1]) * (60 if match[2].startswith("m") else 1)
    try:
        return steps_between(text, steps_per_epoch, "checkpoint_every"), None
    except UsageError as error:
        raise UsageError(str(error).replace("like 500", "like '5 seconds', 500")) from None
