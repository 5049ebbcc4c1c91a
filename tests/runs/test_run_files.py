"""Damaged files of a run's folder: refused in one line or read as what they were, never half believed."""

import base64
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folders

from distributed_mnist.config import Recipe, load_recipe
from distributed_mnist.errors import CheckpointError, DmnistError, OutputError, UsageError
from distributed_mnist.runs import run_files
from distributed_mnist.runs.lock import RunLock, is_live
from distributed_mnist.runs.record import read

COUNT = 500


def one_line(error: DmnistError, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < len(str(path)) + 400, str(error)


def whole_result(**more: Any) -> bytes:
    return json.dumps(run_folders.result(**more)).encode()


def test_whole_files_are_read_as_written(tmp_path: Path) -> None:
    run_folders.write(tmp_path)
    record = read(tmp_path)
    assert record.problems == []
    assert record.config == run_folders.config()
    assert record.events == run_folders.events()
    assert record.result == run_folders.result()
    found = run_files.config_in(tmp_path)
    assert found is not None and found.recipe == Recipe(epochs=2, seed=3)
    assert run_files.config_in(tmp_path / "nowhere") is None
    assert run_files.config_in(tmp_path / "config.json") is None  # not a folder


def test_a_damaged_config_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    path = run_folders.write(tmp_path) / "config.json"
    whole, rng = path.read_bytes(), random.Random(1)
    expected = run_files.config_in(tmp_path)
    refused = 0
    for _ in range(COUNT):
        path.write_bytes(run_folders.damaged(rng, whole))
        try:
            assert run_files.config_in(tmp_path) == expected
        except CheckpointError as error:
            one_line(error, path)
            refused += 1
    assert refused > COUNT * 0.9


@pytest.mark.parametrize(
    ("before", "after"),
    [('"epochs": 2', '"epochs": 6'), ('"seed": 3', '"seed": 2'), ("content_sha256", "content_sha25v")],
)
def test_a_plausible_change_of_the_config_is_refused(before: str, after: str, tmp_path: Path) -> None:
    path = run_folders.write(tmp_path) / "config.json"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    with pytest.raises(CheckpointError, match=r"config\.json .*: delete it, and repeat all flags"):
        run_files.config_in(tmp_path)
    assert "config.json" in read(tmp_path).problems[0]


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    """Python writes such a byte as half a surrogate pair."""
    out = os.fsdecode(b"run \xff")
    config = run_folders.config()
    config["run"]["out"] = out
    run_files.write_config(tmp_path, config)
    found = run_files.config_in(tmp_path)
    assert found is not None and found.run.out == Path(out)
    (tmp_path / "result.json").write_bytes(whole_result(out=out))
    assert run_files.read_result(tmp_path) == run_folders.result(out=out)
    event = run_folders.start(0, lines={"out": out})
    assert run_files.event_of(run_folders.lines(event).encode()) == event


def test_unknown_fields_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(whole_result(unknown=[{}]))
    assert run_files.read_result(tmp_path) == run_folders.result()
    for event in run_folders.events():
        assert run_files.event_of(json.dumps({**event, "unknown": [{}]}).encode()) == event
    assert run_files.event_of(run_folders.lines(run_folders.start(0, event="begin")).encode()) is None


@pytest.mark.parametrize(
    "wrong",
    [
        run_folders.steps(10, losses=[2.0] * 8),
        run_folders.steps(10, ranks={"busy": [0.1], "exchange": [0.1, 0.2]}),
        run_folders.steps(10, losses=[]),
        run_folders.evaluation(10, confusion=[]),
        run_folders.evaluation(10, confusion=[[3, 1], [1]]),
        run_folders.evaluation(10, confusion=[[3, -1], [1, 3]]),
        {key: v for key, v in run_folders.evaluation(10).items() if not key.startswith("test_")},
        run_folders.evaluation(10, validation_loss=0.4, validation_accuracy=0.7, validation_images=8),
        run_folders.start(0, time=1e12),
    ],
)
def test_events_whose_fields_do_not_fit_are_damaged(wrong: dict[str, Any]) -> None:
    assert run_files.event_of(json.dumps(wrong).encode()) is None


@pytest.mark.parametrize("pixels", [28 * 28 - 1, 28 * 28 + 1])
def test_pictures_of_another_size_are_damage(pixels: int, tmp_path: Path) -> None:
    path = run_folders.write(tmp_path) / "mistakes.json"
    mistakes = run_files.read_mistakes(tmp_path)
    assert mistakes is not None
    added = {"images": "test", "image_shape": (1, 28, 28)}
    assert mistakes is not None and mistakes == {**json.loads(path.read_text()), **added}
    mistakes["mistakes"][1]["image"] = base64.b64encode(bytes(pixels)).decode()
    path.write_text(json.dumps(mistakes))
    with pytest.raises(CheckpointError, match=r"damaged \(Expected images of the shape in `image_shape`\)"):
        run_files.read_mistakes(tmp_path)


def without_digest(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "content_sha256"}


def test_a_config_of_an_earlier_version_has_no_digest(tmp_path: Path) -> None:
    path = run_folders.write(tmp_path) / "config.json"
    config = without_digest(json.loads(path.read_text()))
    path.write_text(json.dumps(config))
    found = run_files.config_in(tmp_path)
    assert found is not None and found.recipe.seed == 3
    wrong: list[Callable[[dict[str, Any]], object]] = [
        lambda config: config["recipe"].update(epochs="6"),
        lambda config: config["recipe"].update(epoch=6),
        lambda config: config["run"].update(datasets="mnist"),
        lambda config: config["run"].update(data=3),
        lambda config: config["run"].update(train_size=-1),
        lambda config: config.pop("run"),
    ]
    for change in wrong:
        changed = json.loads(json.dumps(config))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            run_files.config_in(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "result.json", "mistakes.json", "metrics.jsonl", ".group", ".lock"]
)
def test_any_damage_leaves_the_rest_readable(name: str, tmp_path: Path) -> None:
    folder = run_folders.write(tmp_path / "run")
    whole, rng = (folder / name).read_bytes(), random.Random(name)
    expected, kept = read(folder), 0
    for _ in range(COUNT):
        (folder / name).write_bytes(run_folders.damaged(rng, whole))
        record = read(folder)
        assert not is_live(folder)
        for file, value in (
            ("config.json", record.config),
            ("result.json", record.result),
            ("mistakes.json", record.mistakes),
        ):
            if file != name:
                assert value is not None
        if name == "metrics.jsonl":
            assert len(record.problems) <= 1
            kept += len(record.events)
        else:
            assert record.events == expected.events
            for problem in record.problems:
                assert str(folder / name) in problem
                assert problem.isprintable()
        if name == ".group":
            group = run_files.read_group(folder)
            assert group is None or all(isinstance(one, str) for one in [group["what"], *group["starters"]])
    if name == "metrics.jsonl":
        assert kept > COUNT * len(expected.events) / 2


def test_a_damaged_lock_is_taken_and_a_held_one_is_shown_safely(tmp_path: Path) -> None:
    rng = random.Random(2)
    with (tmp_path / ".lock").open("wb"):
        pass
    for _ in range(COUNT):
        (tmp_path / ".lock").write_bytes(run_folders.damaged(rng, b"pid 123 on node1"))
        held = RunLock(tmp_path)
        assert (tmp_path / ".lock").read_bytes().startswith(b"pid ")
        held.release()
    held = RunLock(tmp_path)
    for content, said in ((b"\xff\x1b[2J", "an unknown process"), (b"pid 7 on node1", "pid 7 on node1")):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(OutputError) as caught:
            RunLock(tmp_path)
        assert str(caught.value).endswith(f"is in use by a live run ({said})")
    held.release()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (whole_result().replace(b"{", b'{"unknown": "\xff", ', 1), "'utf-8' codec can't decode byte 0xff"),
        (b'{"unknown": ' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"unknown": "\\udcff", "deep": ' + b"[" * 100_000, "it is nested too deeply"),
        (b"{", "Input data was truncated"),
        (b"[1]", "Expected `object`, got `array`"),
        (b"{}", "Object missing required field `dataset`"),
        (whole_result() + b"x", "JSON is malformed: trailing characters "),
        (
            whole_result(steps=1, again=None).replace(b"again", b"steps"),
            "Expected `int`, got `null` - at `$.steps`",
        ),
        (whole_result(unknown=float("nan")), "JSON is malformed: "),
        (
            whole_result(test_loss=float("nan"), out="\udcff"),
            "Expected `float` > -1e+100 - at `$.test_loss`",
        ),
        (whole_result(test_loss=1e300), "Expected `float` < 1e+100 - at `$.test_loss`"),
        (whole_result(test_loss=1 << 1000), "Expected `float` < 1e+100 - at `$.test_loss`"),
        (whole_result(steps=1 << 63), "Expected `int` <= 9223372036854775807 - at `$.steps`"),
        (whole_result(steps=7).replace(b"7", b"7" * 5000), "Integer value out of range - at `$.steps`"),
        (whole_result(steps=True), "Expected `int`, got `bool` - at `$.steps`"),
        (whole_result(steps=1.0), "Expected `int`, got `float` - at `$.steps`"),
        (whole_result(test_accuracy=2), "Expected `float` <= 1.0 - at `$.test_accuracy`"),
        (
            whole_result(weights_sha256="x"),
            "Expected `str` matching regex '^[0-9a-f]{64}$' - at `$.weights",
        ),
        (
            whole_result(weights_sha256="a" * 64 + "\n"),
            "Expected `str` of length <= 64 - at `$.weights_sha256`",
        ),
        (
            whole_result().replace(b"seconds_here", b"seconds"),
            "Expected both `steps_here` and `seconds_here`",
        ),
    ],
)
def test_what_is_said_of_a_damaged_file(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        run_files.read_result(tmp_path)
    assert f"result.json is damaged ({said}" in str(caught.value)
    assert str(caught.value).endswith(": resume the run with --resume auto to write it again")
    one_line(caught.value, tmp_path / "result.json")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read \(not a file\): resume"):
        run_files.read_result(tmp_path)


def test_events_that_a_full_disk_has_left_do_not_count_steps_twice(tmp_path: Path) -> None:
    """The `start` of the second group is lost."""
    kept = [run_folders.start(0), run_folders.steps(10), run_folders.steps(20), run_folders.steps(20)]
    (tmp_path / "metrics.jsonl").write_text(run_folders.lines(*kept))
    assert [event["step"] for event in read(tmp_path).steps] == [10, 20]


def test_a_runs_recipe(tmp_path: Path) -> None:
    folder = run_folders.write(tmp_path / "run")
    recipe = Recipe(epochs=2, seed=3)
    for name in (folder, folder / "config.json"):
        assert run_files.find_recipe(str(name)) == recipe
        assert run_files.find_recipe(str(name), model="mlp", loss=None) == recipe.replace(model="mlp")
    assert run_files.find_recipe("fast") == load_recipe("fast")


def test_a_runs_recipe_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run in .*, which has no config\.json$"):
        run_files.find_recipe(str(tmp_path))
    folder = run_folders.write(tmp_path / "run")
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(
        CheckpointError, match=r"does not match its digest\): write its settings to a \.toml"
    ):
        run_files.find_recipe(str(folder))
    own = run_folders.config()
    own["recipe"]["model"] = "mine:net"
    run_files.write_config(folder, own)
    with pytest.raises(UsageError, match=r"the model is your own, so give it too: --model mine:net$"):
        run_files.find_recipe(str(folder))
    assert run_files.find_recipe(str(folder), model="mine:net").model == "mine:net"
    own["recipe"] |= {"loss": "mine:loss", "optimizer": "mine:optimizer"}
    run_files.write_config(folder, own)
    with pytest.raises(
        UsageError, match=r"the optimizer is your own, so give it too: --optimizer mine:opt"
    ):
        run_files.find_recipe(str(folder), model="mine:net", loss="mine:loss")


def test_how_often_to_evaluate_was_an_option(tmp_path: Path) -> None:
    """Earlier versions wrote `eval_every` to the options, and now it is in the recipe."""
    config = run_folders.config()
    del config["recipe"]["eval_every"]
    config["run"]["eval_every"] = "9 steps"
    run_files.write_config(tmp_path, config)
    found = run_files.config_in(tmp_path)
    assert found is not None and found.recipe == Recipe(epochs=2, seed=3, eval_every="9 steps")
