"""Whether two runs came to the same answer, and if not: in what, at which step first, and by how much."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs.checkpoint import decode, read_bytes
from ..runs.layout import checkpoints_in

COMPARED = ("data_sha256", "samples_sha256", "weights_sha256", "test_loss")
_WORDS = {
    "data_sha256": "the data",
    "samples_sha256": "the samples and their order",
    "weights_sha256": "the weights",
    "test_loss": "the test loss",
    "losses": "the losses of the steps",
}


@dataclass(frozen=True)
class Answer:
    """What a run came to: nothing in it may depend on how the run was carried out."""

    result: dict[str, Any]
    """Of what `--json` prints, the fields in `COMPARED`."""
    losses: dict[int, float]
    """The exact mean loss of every step."""
    weights: dict[str, torch.Tensor]

    @property
    def sha256(self) -> str:
        """The digest of the weights."""
        return self.result["weights_sha256"]


@dataclass(frozen=True)
class Difference:
    """In what two answers differ."""

    fields: tuple[str, ...]
    """Of `COMPARED`, and `losses`."""
    step: int | None
    """The first whose loss differs; None if none does."""
    losses: tuple[float, float] | None
    """At that step: of the one, and of the other."""
    largest: float
    """The largest difference of two weights at the end; NaN if the weights cannot be compared."""

    def __str__(self) -> str:
        what = f"{_listed([_WORDS[name] for name in self.fields])} differ"
        if self.step is not None and self.losses is not None:
            one, other = self.losses
            what += (
                f", first at step {self.step} (loss {one!r} and {other!r}, {abs(one - other):.2g} apart)"
            )
        if "weights_sha256" in self.fields:
            what += (
                "; the weights cannot be compared"
                if math.isnan(self.largest)
                else f"; final weights are up to {self.largest:.2g} apart"
            )
        return what


def read_answer(folder: Path) -> Answer:
    """What the run in `folder` came to; it has ended well. Raises `CheckpointError`, `OSError`."""
    result = json.loads((folder / "result.json").read_text())
    newest = checkpoints_in(folder / "checkpoints")[-1]
    return Answer(
        result={name: result[name] for name in COMPARED},
        losses=losses_in(read_events(folder)),
        weights=decode(read_bytes(newest), str(newest))["model"],
    )


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's `metrics.jsonl`, none where it does not exist yet. A line that a killed
    process left unfinished is passed over."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def losses_in(events: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The loss of each step; of a step that was repeated, the later one."""
    return {
        step: loss
        for event in events
        if event["event"] == "steps"
        for step, loss in enumerate(event["losses"], start=event["first_step"])
    }


def compare(one: Answer, other: Answer) -> Difference | None:
    """In what `other` differs from `one`, or None."""
    fields = [name for name in COMPARED if one.result[name] != other.result[name]]
    shared = sorted(one.losses.keys() & other.losses.keys())
    step = next((step for step in shared if one.losses[step] != other.losses[step]), None)
    if step is not None:
        fields.append("losses")
    if not fields:
        return None
    return Difference(
        fields=tuple(fields),
        step=step,
        losses=None if step is None else (one.losses[step], other.losses[step]),
        largest=_largest_difference(one.weights, other.weights),
    )


def _largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    if {name: value.shape for name, value in one.items()} != {k: v.shape for k, v in other.items()}:
        return math.nan
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


def _listed(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), words[-1]])
