"""Compare the answers of two runs: which fields differ, at which step first, and by how much."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...runs.checkpoint import decode, read_bytes
from ...runs.layout import checkpoints_in
from ...runs.run_files import event_of, read_result

COMPARED = ("data_sha256", "samples_sha256", "weights_sha256", "test_loss")
_FIELD_NAMES = {
    "data_sha256": "the data",
    "samples_sha256": "the samples and their order",
    "weights_sha256": "the weights",
    "test_loss": "the test loss",
    "losses": "the losses of the steps",
}


@dataclass(frozen=True)
class Answer:
    """The result of a run. It must not depend on the number of processes or on faults."""

    result: dict[str, Any]
    """The fields named in `COMPARED`, as `--json` prints them."""
    losses: dict[int, float]
    """The exact mean loss of every step."""
    weights: dict[str, torch.Tensor]

    @property
    def sha256(self) -> str:
        """The digest of the weights."""
        return self.result["weights_sha256"]


@dataclass(frozen=True)
class Difference:
    """How two answers differ."""

    fields: tuple[str, ...]
    """The fields that differ: names from `COMPARED`, and `losses`."""
    step: int | None
    """The first step whose loss differs; None if no loss differs."""
    losses: tuple[float, float] | None
    """The two losses at that step."""
    largest: float
    """The largest absolute difference of two final weights; NaN if the weights cannot be compared."""

    def __str__(self) -> str:
        text = f"{_enumerated([_FIELD_NAMES[name] for name in self.fields])} differ"
        if self.step is not None and self.losses is not None:
            first, second = self.losses
            text += (
                f", first at step {self.step} (loss {first!r} and {second!r}, "
                f"{abs(first - second):.2g} apart)"
            )
        if "weights_sha256" in self.fields:
            text += (
                "; the weights cannot be compared"
                if math.isnan(self.largest)
                else f"; final weights are up to {self.largest:.2g} apart"
            )
        return text


def read_answer(folder: Path) -> Answer:
    """Read the answer of a finished run from its folder. Raises `CheckpointError`."""
    result, checkpoints = read_result(folder), checkpoints_in(folder / "checkpoints")
    if result is None or not checkpoints:
        raise CheckpointError(f"{folder} has no {'checkpoint' if result else 'result.json'}")
    newest = checkpoints[-1]
    return Answer(
        result={name: result[name] for name in COMPARED},
        losses=losses_in(read_events(folder)),
        weights=decode(read_bytes(newest), str(newest))["model"],
    )


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events in a run's `metrics.jsonl`; none if the file does not exist yet.

    Skips a line that a killed process left unfinished.
    """
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    except OSError:
        return []
    return [event for line in lines if (event := event_of(line)) is not None]


def losses_in(events: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Return the loss of each step; for a step that was repeated, the later loss."""
    return {
        step: loss
        for event in events
        if event["event"] == "steps"
        for step, loss in enumerate(event["losses"], start=event["first_step"])
    }


def compare(reference: Answer, other: Answer) -> Difference | None:
    """Return how `other` differs from `reference`, or None if it does not."""
    fields = [name for name in COMPARED if reference.result[name] != other.result[name]]
    shared = sorted(reference.losses.keys() & other.losses.keys())
    step = next((step for step in shared if reference.losses[step] != other.losses[step]), None)
    if step is not None:
        fields.append("losses")
    if not fields:
        return None
    return Difference(
        fields=tuple(fields),
        step=step,
        losses=None if step is None else (reference.losses[step], other.losses[step]),
        largest=_largest_difference(reference.weights, other.weights),
    )


def _largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    if {name: value.shape for name, value in first.items()} != {k: v.shape for k, v in second.items()}:
        return math.nan
    return max(float((value.double() - second[name].double()).abs().max()) for name, value in first.items())


def _enumerated(names: list[str]) -> str:
    """Join as in `a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])
