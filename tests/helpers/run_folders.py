"""A small, complete run folder without a training, and random damage to its files."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import fuzz

from distributed_mnist.config import Recipe, Run
from distributed_mnist.runs.run_files import write_config

DIGESTS = {
    f"{name}_sha256": digit * 64 for name, digit in (("weights", "a"), ("samples", "b"), ("data", "c"))
}
RANKS = [{"rank": rank, "host": f"node{rank}", "pid": 100 + rank} for rank in range(2)]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    1 << 70,
    10**400,
    -1e-300,
    1e-320,
    1e99,
    1e308,
    float("nan"),
    float("inf"),
]
ODD += ["", "x", "\x1b[2J", "\udcff", "<b>", [], [[]], [1], ["a"], {}, {"a": 1}, {"step": 3}]


def start(step: int, **more: Any) -> dict[str, Any]:
    lines = {"recipe": "default: linear", "data": "idx", "world": "2 processes", "out": "out"}
    fields = {"lines": lines, "world_size": 2, "step": step, "steps": 40, "epochs": 2, "again": step > 0}
    return {"event": "start", "time": 1e9, **fields, "ranks": RANKS, **more}


def steps(step: int, first_step: int | None = None, **more: Any) -> dict[str, Any]:
    first_step = step - 9 if first_step is None else first_step
    fields: dict[str, Any] = {
        "step": step,
        "epoch": step / 20,
        "loss": 1.5,
        "lr": 0.01,
        "images_per_second": 3e4,
    }
    fields |= {"seconds": {"step": 0.02, "forward": 0.01, "exchange": 0.002}}
    fields |= {"ranks": {"busy": [0.01, 0.02], "exchange": [0.01, 0.0]}}
    fields |= {"first_step": first_step, "losses": [2.0] * (step - first_step + 1)}
    return {"event": "steps", "time": 1e9 + step, **fields, **more}


def evaluation(step: int, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"step": step, "epoch": step / 20, "train_loss": 0.5, "train_accuracy": 0.8}
    fields |= {"test_loss": 0.4, "test_accuracy": 0.75, "test_images": 8, "best": True}
    return {"event": "evaluation", "time": 1e9 + step, **fields, "confusion": [[3, 1], [1, 3]], **more}


def result(**more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"dataset": "idx", "model": "linear", "sync": "tree", "epochs": 2, "steps": 40}
    fields |= {"test_accuracy": 0.75, "test_loss": 0.4, "test_images": 8, "train_seconds": 0.8, **DIGESTS}
    fields |= {"world_size": 2, "device": "cpu", "steps_here": 40, "seconds_here": 0.8}
    return {**fields, "images_per_second": 3e4, "total_seconds": 2.0, "out": "out", **more}


def events() -> list[dict[str, Any]]:
    """The events of a run that was restarted once."""
    saved = {
        "event": "checkpoint",
        "time": 1e9 + 21,
        "step": 20,
        "path": "step_00000020.pt",
        "seconds": 0.1,
    }
    notice = {"event": "notice", "time": 1e9 + 22, "text": "a notice"}
    first = [start(0), steps(1, 1), steps(10, 2), steps(20), evaluation(20), saved, steps(30)]
    again = [start(20), notice, steps(30), steps(40), evaluation(40)]
    return [*first, *again, {"event": "end", "time": 1e9 + 50, "result": result()}]


def lines(*events: dict[str, Any]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def config() -> dict[str, Any]:
    run = {name: str(value) if isinstance(value, Path) else value for name, value in vars(Run()).items()}
    dataset = {
        "name": "idx",
        "class_names": ["0", "1"],
        "mean": 0.1,
        "std": 0.3,
        "sha256": "c" * 64,
        "source": "here",
    }
    versions = {"dmnist": "0.1.0", "torch": "2"}
    return {
        "recipe": Recipe(epochs=2, seed=3).to_dict(),
        "run": run,
        "dataset": dataset,
        "versions": versions,
    }


def write(folder: Path) -> Path:
    """Write a finished run's files, without checkpoints."""
    folder.mkdir(exist_ok=True)
    write_config(folder, config())
    (folder / "metrics.jsonl").write_text(lines(*events()))
    (folder / "result.json").write_text(json.dumps(result()))
    image = base64.b64encode(bytes(28 * 28)).decode()
    mistake = {"index": 3, "label": 0, "predicted": 1, "confidence": 0.9, "image": image}
    (folder / "mistakes.json").write_text(json.dumps({"step": 40, "mistakes": [mistake] * 2}))
    (folder / ".group").write_text(
        json.dumps({"mark": "ab" * 8, "what": "d" * 64, "starters": ["e" * 16, "f"]})
    )
    (folder / ".lock").write_text("pid 123 on node1")
    return folder


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The file with random bytes changed or, half of the time, with an odd value in one of its objects."""
    if rng.random() < 0.5:
        return fuzz.damaged(rng, data)
    parts = data.split(b"\n") if data.count(b'{"event"') else [data]
    number = rng.randrange(len(parts))
    try:
        value = json.loads(parts[number])
    except ValueError:
        return fuzz.damaged(rng, data)
    parts[number] = json.dumps(_with_odd_value(rng, value)).encode()
    return b"\n".join(parts)


def _with_odd_value(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = _with_odd_value(rng, value[key])
    return value
