"""Checkpoint files: complete or refused, harmless even if untrusted, and intact after a failed write."""

import copy
import errno
import io
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distributed_mnist.common.digest import digest
from distributed_mnist.config import Recipe
from distributed_mnist.errors import CheckpointError
from distributed_mnist.exact.scales import Scales
from distributed_mnist.optim.schedule import make_optimizer
from distributed_mnist.runs.checkpoint import (
    FORMAT,
    decode,
    encode,
    load_weights,
    read_bytes,
    versions,
    write,
)
from distributed_mnist.runs.optimizer_state import load_optimizer
from distributed_mnist.training.state import State


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, width), nn.Linear(width, 10)
    )


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 1, 28, 28)).square().mean().backward()
        optimizer.step()


def content(**changes: Any) -> dict[str, Any]:
    """Return the content of a checkpoint, with every kind of value in it."""
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(Recipe(), model)
    trained(model, optimizer)
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scales": torch.tensor([1.5, 0.0]),
        "step": 2,
        "best_accuracy": 0.1 + 0.2,
        "best_step": 1,
        "evaluations_since_best": 1,
        "best_weights": model.state_dict(),
        "samples_sha256": "ab" * 32,
        "totals": {"loss": 1.5, "correct": 3, "images": 8},
        "train_seconds": 0.25,
        "recipe": Recipe().to_dict(),
        "dataset": {
            "name": "generated",
            "class_names": ["0", "1"],
            "image_shape": [1, 28, 28],
            "mean": 0.1,
            "std": 0.3,
            "sha256": "cd",
        },
        "steps_per_epoch": 4,
        "versions": versions(torch.device("cpu")),
        **changes,
    }


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        decode(data, "file.pt")
    said = str(caught.value)
    assert said.startswith("file.pt ")
    assert "\n" not in said
    return said.removeprefix("file.pt ")


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WHOLE = encode(content())


def test_round_trip_is_exact() -> None:
    before, after = content(), decode(WHOLE, "file.pt")
    assert digest(after) == digest(before)
    assert after.keys() == before.keys()
    assert after["best_accuracy"] == 0.30000000000000004
    for key, value in before["model"].items():
        assert torch.equal(after["model"][key], value)
        assert after["model"][key].dtype == value.dtype


def test_special_numbers_survive() -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    after = decode(encode(content(model={"w": odd}, train_seconds=float("inf"))), "file.pt")
    assert odd.numpy().tobytes() == after["model"]["w"].numpy().tobytes()
    assert after["train_seconds"] == float("inf")


def test_a_flipped_bit_is_detected_or_harmless() -> None:
    expected = digest(content())
    rng = np.random.default_rng(0)
    # All over the file, and closely at its ends, where the archive and the pickle have their structure.
    places = {*range(0, 1500, 5), *range(len(WHOLE) - 1500, len(WHOLE), 5)}
    places |= set(rng.integers(0, len(WHOLE), 300).tolist())
    harmless = 0
    for place in sorted(places):
        damaged = bytearray(WHOLE)
        damaged[place] ^= 1 << rng.integers(8)
        try:
            after = decode(bytes(damaged), "file.pt")
        except CheckpointError:
            continue
        harmless += 1
        assert digest(after) == expected, f"byte {place}"
    assert harmless < len(places) / 2


def test_a_truncated_file_is_refused() -> None:
    lengths = {*range(40), *range(0, len(WHOLE), len(WHOLE) // 150), *range(len(WHOLE) - 40, len(WHOLE))}
    for length in sorted(lengths):
        assert refused(WHOLE[:length]).startswith("is damaged or not a checkpoint: ")


def test_zeros_where_a_disk_lost_a_block() -> None:
    for start in range(0, len(WHOLE) - 4096, len(WHOLE) // 20):
        refused(WHOLE[:start] + bytes(4096) + WHOLE[start + 4096 :])


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_an_untrusted_file_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "was-here"
    honest = content()
    files = [
        saved(Malice(trace)),
        saved({**honest, "content_sha256": digest(honest), "extra": Malice(trace)}),
        saved({"epoch": 1, "state_dict": {}, "best_acc": 0.5, "optimizer": Malice(trace)}),
        pickle.dumps(Malice(trace)),
        pickle.dumps({"format": FORMAT, "model": Malice(trace)}),
    ]
    for data in files:
        refused(data)
        assert not trace.exists()
    why = refused(files[1])
    assert why.endswith("it holds more than tensors and plain values, and loading those could run code")
    torch.load(io.BytesIO(files[0]), weights_only=False).close()
    assert trace.exists()  # the file is as hostile as it should be


@pytest.mark.parametrize("value", [None, 3, "text", [], torch.zeros(2), (1, 2)])
def test_values_other_than_dictionaries(value: object) -> None:
    assert refused(saved(value)) == f"is not a checkpoint: it holds a {type(value).__name__}"


def recursive() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["itself"] = inner
    return inner


STRANGE: dict[str, Any] = {
    "empty": {},
    "weights alone": {"fc.weight": torch.zeros(3)},
    "unclaimed": content(),
    "claim of another type": {**content(), "content_sha256": 5},
    "odd keys": {1: 2, None: 3, (1, 2): 4},
    "bytes": {"model": b"bytes"},
    "set": {"model": {1, 2}},
    "complex": {"model": torch.zeros(3, dtype=torch.complex64).conj()},
    "sparse": {"model": torch.eye(3).to_sparse()},
    "meta": {"model": torch.zeros(3, device="meta")},
    "recursive": recursive(),
    "original with numbers for weights": {"epoch": 1, "state_dict": 5, "best_acc": 0.5, "optimizer": {}},
    "original with numbers for names": {
        "epoch": 1,
        "state_dict": {3: torch.zeros(2)},
        "best_acc": 0.5,
        "optimizer": {},
    },
    "original with text for its epoch": {"epoch": "1", "state_dict": {}, "best_acc": 0.5, "optimizer": {}},
    "original with a list of ours": {
        "epoch": 1,
        "state_dict": {},
        "best_acc": 0.5,
        "optimizer": {},
        "dmnist": [1],
    },
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_things_that_torch_saves_are_refused(name: str) -> None:
    """No file may end the program with a traceback."""
    refused(saved(STRANGE[name]))


@pytest.mark.parametrize("found", [FORMAT + 1, 0, "1", None])
def test_another_format(found: object) -> None:
    assert refused(encode(content(format=found))) == f"has format {found!r}; this version reads {FORMAT}"


@pytest.mark.parametrize(
    "key", ["model", "optimizer", "step", "best_accuracy", "samples_sha256", "recipe", "dataset"]
)
def test_a_missing_part(key: str) -> None:
    partial = content()
    del partial[key]
    assert refused(encode(partial)) == f"lacks {key}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("std", 0.0), ("std", float("nan")), ("mean", float("inf")), ("class_names", [0, 1, 2, 3, 4, 5])],
)
def test_an_invalid_data_set(field: str, value: Any) -> None:
    strange = content()
    strange["dataset"] = {**strange["dataset"], field: value}
    assert "invalid class names, or an invalid mean or deviation" in refused(encode(strange))


@pytest.mark.parametrize(
    "scales",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("inf")]),
        torch.tensor([-1.0]),
        torch.ones(1, 2),
        torch.ones(2, dtype=torch.float64),
    ],
)
def test_invalid_scales(scales: torch.Tensor) -> None:
    assert refused(encode(content(scales=scales))) == "has invalid scales"


def test_a_run_in_exact_arithmetic_does_not_resume_without_scales() -> None:
    """It would find other ones, and end with other weights."""
    model = network()
    state = State(model, make_optimizer(Recipe(), model), Scales(torch.device("cpu")))
    state.restore(content(), "file.pt")
    with pytest.raises(CheckpointError, match=r"^file\.pt lacks the scales of exact arithmetic: "):
        state.restore(content(scales=torch.zeros(0)), "file.pt")
    state.restore(content(scales=torch.zeros(0), step=0), "file.pt")  # before the first step it has none


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    with pytest.raises(CheckpointError, match=r"some\.pt: no such file or directory$"):
        read_bytes(path)
    with pytest.raises(CheckpointError, match=r"is a folder, not a checkpoint$"):
        read_bytes(tmp_path)
    path.write_bytes(WHOLE)
    assert read_bytes(path) == WHOLE


def test_weights_are_loaded_exactly() -> None:
    source, target = network(), network()
    trained(source, make_optimizer(Recipe(), source))
    assert digest(dict(target.state_dict())) != digest(dict(source.state_dict()))
    load_weights(target, decode(encode(content(model=source.state_dict())), "file.pt")["model"], "file.pt")
    assert digest(dict(target.state_dict())) == digest(dict(source.state_dict()))


def test_weights_of_another_model() -> None:
    model, weights = network(), network().state_dict()
    before = digest(dict(model.state_dict()))
    renamed = {key.replace("2.", "5."): value for key, value in weights.items()}
    fewer = {key: value for key, value in weights.items() if key != "0.bias"}
    for wrong, said in (
        (renamed, "is from a different model: only one of the two has 2.bias, 2.weight, 5.bias, 5.weight"),
        (fewer, "is from a different model: only one of the two has 0.bias"),
        ({**weights, "extra": torch.zeros(1)}, "is from a different model: only one of the two has extra"),
        (network(7).state_dict(), "is from a different model: 2.weight is (7, 1352), not (6, 1352)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_weights(model, wrong, "file.pt")
        assert str(caught.value) == f"file.pt {said}"
        assert digest(dict(model.state_dict())) == before


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_restored_optimizer_continues_bit_for_bit(optimizer: Any) -> None:
    recipe = Recipe(optimizer=optimizer)
    straight = network()
    its = make_optimizer(recipe, straight)
    trained(straight, its, 3)
    file = encode(content(model=straight.state_dict(), optimizer=its.state_dict()))
    trained(straight, its, 3)

    again = network()
    restored = make_optimizer(recipe, again)
    after = decode(file, "file.pt")
    load_weights(again, after["model"], "file.pt")
    load_optimizer(restored, after["optimizer"], "file.pt")
    trained(again, restored, 3)
    assert digest(dict(again.state_dict())) == digest(dict(straight.state_dict()))
    assert digest(restored.state_dict()) == digest(its.state_dict())


@pytest.mark.parametrize(("precision", "where"), [("fp32", "meta"), ("exact", "cpu")])
def test_steps_are_counted_where_the_kernels_read_them(precision: Any, where: str) -> None:
    """Also after a move from the CPU to another device."""
    recipe, model = Recipe(precision=precision), network()
    optimizer = make_optimizer(recipe, model)
    trained(model, optimizer)
    moved = network().to("meta")
    restored = make_optimizer(recipe, moved)
    load_optimizer(restored, optimizer.state_dict(), "file.pt", steps=2)
    counts = [state["step"] for state in restored.state.values() if "step" in state]
    assert {count.device.type for count in counts} == {where}


def test_learning_rates_stay_the_recipes() -> None:
    saved_state = make_optimizer(Recipe(lr=0.5, beta1=0.1), network()).state_dict()
    optimizer = make_optimizer(Recipe(lr=0.25, beta1=0.2), network())
    load_optimizer(optimizer, saved_state, "file.pt")
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.25, (0.2, 0.999))]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_optimizer_state_that_was_emptied_is_refused(optimizer: str) -> None:
    """A file with such a state can have a valid digest. The moments would silently begin at zero again."""
    recipe, model = Recipe(optimizer=optimizer), network()  # type: ignore[arg-type]
    its = make_optimizer(recipe, model)
    none_yet = its.state_dict()
    trained(model, its, 2)
    whole = copy.deepcopy(its.state_dict())
    first = next(iter(whole["state"]))
    without_one = {**whole, "state": {i: of_one for i, of_one in whole["state"].items() if i != first}}
    without_value = copy.deepcopy(whole)
    without_value["state"][first].popitem()
    load_optimizer(make_optimizer(recipe, network()), whole, "file.pt", steps=2)
    load_optimizer(make_optimizer(recipe, network()), none_yet, "file.pt", steps=0)
    for wrong in (none_yet, without_one, without_value):
        with pytest.raises(
            CheckpointError, match=r"^file\.pt: its optimizer state does not fit: it lacks "
        ):
            load_optimizer(make_optimizer(recipe, network()), wrong, "file.pt", steps=2)


@pytest.mark.parametrize("step", [-1.0, float("nan"), float("inf"), "1"])
def test_a_step_of_the_optimizer_that_is_none_is_refused(step: Any) -> None:
    model = network()
    its = make_optimizer(Recipe(), model)
    trained(model, its, 1)
    wrong = copy.deepcopy(its.state_dict())
    wrong["state"][0]["step"] = step
    with pytest.raises(CheckpointError, match=r"^file\.pt: its optimizer state does not fit: "):
        load_optimizer(make_optimizer(Recipe(), network()), wrong, "file.pt", steps=1)


def test_sgd_without_momentum_has_no_state() -> None:
    recipe, model = Recipe(optimizer="sgd", momentum=0.0), network()
    its = make_optimizer(recipe, model)
    trained(model, its, 2)
    load_optimizer(make_optimizer(recipe, network()), its.state_dict(), "file.pt", steps=2)


def test_an_optimizer_of_another_size() -> None:
    model = network()
    optimizer = make_optimizer(Recipe(), model)
    smaller = nn.Linear(3, 3)
    its = make_optimizer(Recipe(), smaller)
    for wrong in (its.state_dict(), {}, {"state": {}}, {"state": {}, "param_groups": [{}]}):
        with pytest.raises(CheckpointError, match=r"^file\.pt: its optimizer state does not fit: "):
            load_optimizer(optimizer, wrong, "file.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        5,
        [],
        {"state": None, "param_groups": []},
        {"state": 5, "param_groups": [{"params": range(6)}]},
        {"state": {0: 5}, "param_groups": [{"params": range(6)}]},
        {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"params": range(6)}]},
        {"state": {}, "param_groups": 5},
    ],
    ids=str,
)
def test_invalid_optimizer_state(wrong: Any) -> None:
    """The original's format has no digest, so the values may be anything."""
    with pytest.raises(CheckpointError, match=r"^file\.pt: its optimizer state does not fit: "):
        load_optimizer(make_optimizer(Recipe(), network()), wrong, "file.pt")


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def adam_state(model: nn.Module) -> dict[str, Any]:
    """Return the state that Adam saves after one step."""
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer.state_dict()


def with_averages(state: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """Return the state with both averages of each parameter changed."""
    changed = {
        i: {**of_one, "exp_avg": change(of_one["exp_avg"]), "exp_avg_sq": change(of_one["exp_avg_sq"])}
        for i, of_one in state["state"].items()
    }
    return {**state, "state": changed}


SPOILT: dict[str, Callable[[torch.Tensor], Any]] = {
    "too small": lambda average: torch.zeros(1),
    "empty": lambda average: torch.zeros(0),
    "transposed": lambda average: average.transpose(0, -1) if average.dim() > 1 else average[:-1],
    "flat": lambda average: torch.zeros(average.numel() + 1),
    "no tensor": lambda average: 0.5,
}


@pytest.mark.parametrize("how", SPOILT)
def test_optimizer_state_of_other_shapes_is_refused(how: str) -> None:
    """torch's fused steps do not check shapes: they would write past the end of a smaller tensor."""
    model = channels_last()
    wrong = with_averages(adam_state(model), SPOILT[how])
    with pytest.raises(CheckpointError, match=r"^file\.pt: its optimizer state does not fit: "):
        load_optimizer(make_optimizer(Recipe(), model), wrong, "file.pt")


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.contiguous, lambda average: torch.zeros(1).expand(average.shape)],
    ids=["other strides", "one number for all"],
)
def test_optimizer_state_has_the_layout_of_its_parameter(change: Callable[[torch.Tensor], Any]) -> None:
    """torch's fused steps use memory order, not indices: with other strides they would mix up numbers."""
    model = channels_last()
    saved_state = with_averages(adam_state(model), change)
    optimizer = make_optimizer(Recipe(), model)
    load_optimizer(optimizer, saved_state, "file.pt")
    for i, parameter in enumerate(model.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            average = optimizer.state[parameter][name]
            assert torch.equal(average, saved_state["state"][i][name])
            assert average.stride() == parameter.stride()


def test_weights_that_are_not_tensors() -> None:
    model = network()
    with pytest.raises(
        CheckpointError, match=r"^file\.pt is from a different model: 0\.bias is not a tensor"
    ):
        load_weights(model, {**model.state_dict(), "0.bias": 5}, "file.pt")  # type: ignore[dict-item]


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """Limit files to `size` bytes: a write then fails part-way with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_written_completely(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.pt"
    write(path, b"first")
    write(path, WHOLE)
    assert path.read_bytes() == WHOLE
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("existing", [b"the old one", None])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, existing: bytes | None) -> None:
    path = tmp_path / "a.pt"
    if existing is not None:
        path.write_bytes(existing)
    with pytest.raises(OSError, match="File too large"), little_room(1000):
        write(path, WHOLE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == (
        [] if existing is None else [("a.pt", existing)]
    )


def test_a_failed_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems report a full disk only on flush."""
    path = tmp_path / "a.pt"
    write(path, b"the old one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        write(path, WHOLE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pt", b"the old one")]


@pytest.mark.parametrize(
    "content", [{"weight": torch.zeros(2)}, {"state_dict": {}, "pytorch-lightning_version": "2"}]
)
def test_a_checkpoint_of_another_program(content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(
        CheckpointError, match=r"x\.pt is not a checkpoint of dmnist: another program wrote it"
    ):
        decode(buffer.getvalue(), "x.pt")


def test_a_checkpoint_of_an_earlier_version_gets_what_it_lacks() -> None:
    names = ("best_step", "evaluations_since_best", "best_weights")
    earlier = {key: value for key, value in content().items() if key not in names}
    after = decode(encode(earlier), "file.pt")
    assert [after[name] for name in names] == [0, 0, {}]
