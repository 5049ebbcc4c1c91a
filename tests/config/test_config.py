"""Recipes and run options: bad values are refused by name, good ones survive a round trip."""

import dataclasses
import json
import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from distributed_mnist.config import (
    Recipe,
    Run,
    checkpoint_interval,
    load_recipe,
    recipe_names,
    steps_between,
)
from distributed_mnist.errors import UsageError

NAN, INF = float("nan"), float("inf")

OTHER: dict[str, Any] = {
    "model": "mlp",
    "epochs": 7,
    "steps": 30,
    "batch_size": 100,
    "loss": "mine:focal",
    "optimizer": "sgd",
    "lr": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "momentum": 0.5,
    "adam_lr": 0.5,
    "weight_decay": 0.5,
    "schedule": "cosine",
    "decay_every": 3,
    "decay_factor": 0.5,
    "warmup": 0.5,
    "final_div": 20.0,
    "average": 0.5,
    "ema": 0.9,
    "validation": 0.1,
    "patience": 3,
    "eval_every": "500",
    "clip": 0.5,
    "label_smoothing": 0.5,
    "shift": 2.0,
    "rotate": 10.0,
    "scale": 0.5,
    "seed": 9,
    "sync": "ddp",
    "shards": 5,
    "precision": "bf16",
}
"""For each field a value that is not the default."""
TOGETHER: dict[str, Any] = {**OTHER, "ema": 0.0, "patience": 0, "label_smoothing": 0.0}
"""Such values that go together."""


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(values, "here")
    return str(caught.value)


def test_other_has_every_field_and_no_default() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Recipe)}
    assert all(getattr(Recipe(), name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(**TOGETHER)])
def test_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict(), "here") == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "here") == recipe


def test_missing_fields_take_their_defaults() -> None:
    assert Recipe.from_dict({}, "here") == Recipe()
    assert Recipe.from_dict({"epochs": 9}, "here") == Recipe(epochs=9)


def test_whole_numbers_are_allowed_for_floats() -> None:
    recipe = Recipe.from_dict({"lr": 1, "shift": 2}, "here")
    assert (recipe.lr, recipe.shift) == (1.0, 2.0)
    assert isinstance(recipe.lr, float)


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("epochs", [0, -1], "at least 1"),
        ("batch_size", [0, -256], "at least 1"),
        ("decay_every", [0], "at least 1"),
        ("shards", [0], "at least 1"),
        ("shards", [1025, 60_000, 10**9], "at most 1024"),
        ("batch_size", [10**12], "at most 1000000000"),
        ("epochs", [10**30], "at most 1000000000"),
        ("weight_decay", [-0.1, NAN, INF], "zero or more"),
        ("shift", [-1.0, NAN, INF], "zero or more"),
        ("rotate", [-1.0, NAN, INF], "zero or more"),
        ("scale", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("validation", [-1, -0.1, NAN, INF], "zero or more"),
        ("validation", [1.0, 2.5, 5000.0], "a whole number of images, or a fraction below 1"),
        ("patience", [-1], "zero or more"),
        ("beta1", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("beta2", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("momentum", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("label_smoothing", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("ema", [-0.1, 1.0, NAN], "at least 0 and below 1"),
        ("clip", [-0.1, NAN, INF], "zero or more"),
        ("lr", [0.0, -1.0, NAN, INF], "above zero"),
        ("decay_factor", [0.0, -1.0, NAN, INF], "above zero"),
        ("warmup", [-0.1, 1.1, NAN], "between 0 and 1"),
        ("average", [-0.1, 1.1, NAN], "between 0 and 1"),
        ("final_div", [0.9, -1.0, NAN, INF], "at least 1"),
        ("seed", [-1, 2**63], "between 0 and 2^63 - 1"),
    ],
)
def test_impossible_values_of_a_recipe(name: str, values: list[Any], rule: str) -> None:
    for value in values:
        with pytest.raises(UsageError) as caught:
            Recipe().replace(**{name: value})
        message = f"--{name.replace('_', '-')} must be {rule}, not {value}"
        assert str(caught.value) == message
        assert problem({name: value}) == f"here: {message}"


def test_fields_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"^--ema must be 0 with --average 0.5, not 0.9$"):
        Recipe(average=0.5, ema=0.9)
    with pytest.raises(UsageError, match=r"^--label-smoothing must be 0 with a loss of your own, not 0.1$"):
        Recipe(loss="mine:focal", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("warmup", [0.0, 1.0]),
        ("average", [0.0, 1.0]),
        ("final_div", [1.0]),
        ("seed", [0, 2**63 - 1]),
        ("beta1", [0.0]),
        ("weight_decay", [0.0]),
    ],
)
def test_the_limits_of_a_range_are_allowed(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(Recipe().replace(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("train_size", 0, "at least 1"),
        ("test_size", -1, "at least 1"),
        ("keep", 0, "at least 1"),
        ("nproc", 0, "at least 1"),
        ("nproc", 10**9, "at most 1024"),
        ("train_size", 10**12, "at most 5000000"),
        ("micro_batch", 0, "at least 1"),
        ("data_seed", -1, "between 0 and 2^63 - 1"),
        ("data_seed", 2**63, "between 0 and 2^63 - 1"),
    ],
)
def test_impossible_values_of_a_run(name: str, value: Any, rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        Run(**{name: value})
    assert str(caught.value) == f"--{name.replace('_', '-')} must be {rule}, not {value}"


@pytest.mark.parametrize("name", ["train_size", "test_size", "data_seed"])
def test_sizes_and_seed_are_for_generated_digits_only(name: str) -> None:
    values: dict[str, Any] = {name: 7}
    for dataset in ("generated", "auto"):
        assert getattr(Run(dataset=dataset, **values), name) == 7
    for dataset in ("mnist", "idx"):
        with pytest.raises(UsageError) as caught:
            Run(dataset=dataset, **values)
        assert str(caught.value) == f"--{name.replace('_', '-')} only goes with --dataset generated"


def test_auto_resume_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--resume auto needs --out: the folder of the run to resume$"):
        Run(resume="auto")
    assert Run(resume="auto", out=tmp_path).resume == "auto"
    assert Run(resume="some.pt").out is None


@pytest.mark.parametrize("name", ["checkpoint_every", "eval_every"])
@pytest.mark.parametrize(
    "text", ["", "0", "0 epochs", "-1", "1.5 epochs", "often", "2 days", "epoch", "1 2"]
)
def test_impossible_intervals(name: str, text: str) -> None:
    seconds = "'5 seconds', " if name == "checkpoint_every" else ""
    message = (
        rf"^--{name.replace('_', '-')} must be like {seconds}500 \(steps\) or '2 epochs', not '{text}'$"
    )
    values: dict[str, Any] = {name: text}
    with pytest.raises(UsageError, match=message):
        Run(**values) if name == "checkpoint_every" else Recipe(**values)
    if name == "eval_every":
        with pytest.raises(UsageError, match=message):
            steps_between(text, 10, name)


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [
        ("5 seconds", None, 5.0),
        ("0.5 s", None, 0.5),
        ("1 second", None, 1.0),
        ("2s", None, 2.0),
        ("2 minutes", None, 120.0),
        ("500", 500, None),
        ("2 epochs", 20, None),
    ],
)
def test_checkpoints_by_time_or_by_steps(text: str, steps: int | None, seconds: float | None) -> None:
    assert checkpoint_interval(text, 10) == (steps, seconds)


@pytest.mark.parametrize("text", ["0 seconds", "0.0 s", "-1 s", "seconds", "1 hour"])
def test_impossible_durations(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--checkpoint-every must be like '5 seconds', "):
        Run(checkpoint_every=text)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_restarts", -1, "zero or more"),
        ("hang_after", 0.5, "at least 1"),
        ("hang_after", float("inf"), "at least 1"),
        ("hang_after", float("nan"), "at least 1"),
    ],
)
def test_impossible_limits(name: str, value: float, rule: str) -> None:
    values: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be {rule}, not {value}$"):
        Run(**values)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("500", 500),
        ("1 step", 1),
        ("500 steps", 500),
        ("500steps", 500),
        (" 7 ", 7),
        ("1 epoch", 235),
        ("2 epochs", 470),
        ("3epochs", 705),
    ],
)
def test_intervals(text: str, steps: int) -> None:
    assert steps_between(text, 235, "eval_every") == steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "here: there is no recipe field 'epoch'; did you mean epochs?"),
        ({"epochs": "3"}, "here: epochs must be a whole number, not '3'"),
        ({"epochs": 3.0}, "here: epochs must be a whole number, not 3.0"),
        ({"epochs": True}, "here: epochs must be a whole number, not True"),
        ({"lr": "fast"}, "here: lr must be a number, not 'fast'"),
        ({"lr": True}, "here: lr must be a number, not True"),
        ({"lr": [0.1]}, "here: lr must be a number, not [0.1]"),
        ({"model": 3}, "here: model must be text, not 3"),
        ({"sync": "ring"}, "here: sync must be tree or ddp, not 'ring'"),
        ({"optimizer": ["sgd"]}, "here: optimizer must be text, not ['sgd']"),
        (
            {"optimizer": "adan"},
            "here: there is no optimizer 'adan'; did you mean adam? there are adam, adamw, sgd, muon, or "
            "package.module:function",
        ),
        ({"precision": "fp8"}, "here: precision must be auto or fp32 or bf16 or exact, not 'fp8'"),
        ({"schedule": 1}, "here: schedule must be constant or step or cosine or one-cycle, not 1"),
    ],
)
def test_wrong_fields_and_types(values: dict[str, Any], message: str) -> None:
    assert problem(values) == message


def test_a_number_beyond_floating_point_is_refused() -> None:
    """TOML integers have no upper limit."""
    assert problem({"lr": 10**400}).startswith("here: ")


def test_shipped_recipes_equal_their_files() -> None:
    names = recipe_names()
    assert {"default", "classic"} <= set(names)
    folder = resources.files("distributed_mnist") / "recipes"
    for name in names:
        written = tomllib.loads((folder / f"{name}.toml").read_text())
        assert load_recipe(name) == Recipe(**written)


def test_the_classic_recipe_is_the_original_scripts() -> None:
    classic = load_recipe("classic")
    assert classic.replace(sync="tree") == Recipe(
        model="linear",
        epochs=20,
        batch_size=256,
        lr=1e-3,
        optimizer="adam",
        schedule="step",
        decay_every=10,
        decay_factor=0.1,
    )


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('model = "mlp"\nlr = 1\nshards = 3\n')
    assert load_recipe(str(path)) == Recipe(model="mlp", lr=1.0, shards=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epoch = 3", "{}: there is no recipe field 'epoch'"),
        (b"epochs = 'many'", "{}: epochs must be a whole number, not 'many'"),
        (b"epochs = 0", "{}: --epochs must be at least 1, not 0"),
        (b"lr = nan", "{}: --lr must be above zero, not nan"),
        (b"[training]\nlr = 1", "{}: there is no recipe field 'training'"),
        (b"epochs: 3", "{} is not TOML: "),
        (b"model = '\xff'", "{} is not TOML: "),
        (b"\x89PNG\r\n\x1a\n", "{} is not TOML: "),
    ],
)
def test_bad_recipe_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(message.format(path))


def test_no_such_recipe(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(UsageError, match=r"none\.toml: no such file or directory$"):
        load_recipe(str(path))
    with pytest.raises(
        UsageError, match=r"there is no recipe 'fastest'; did you mean fast\? there are .*classic.*default"
    ):
        load_recipe("fastest")
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml: not a file$"):
        load_recipe(str(folder))


@pytest.mark.parametrize("name", sorted(OTHER))
def test_each_field_counts_as_a_difference(name: str) -> None:
    base = Recipe(schedule="one-cycle", validation=100)
    other = base.replace(**{name: OTHER[name]})
    assert base.differences(base) == {}
    assert base.differences(other) == {name: (getattr(base, name), OTHER[name])}


def test_all_differences_are_shown() -> None:
    found = Recipe().differences(Recipe(lr=0.5, seed=3))
    assert found == {"lr": (0.001, 0.5), "seed": (0, 3)}


@pytest.mark.parametrize(
    ("schedule", "counts"), [("constant", False), ("step", False), ("cosine", True), ("one-cycle", True)]
)
def test_epochs_count_if_the_schedule_depends_on_the_end(schedule: Any, counts: bool) -> None:
    short, long = Recipe(epochs=2, schedule=schedule), Recipe(epochs=5, schedule=schedule)
    assert short.differences(long) == ({"epochs": (2, 5)} if counts else {})
    assert long.differences(short) == ({"epochs": (5, 2)} if counts else {})
    assert short.differences(long.replace(seed=1))["seed"] == (0, 1)


@pytest.mark.parametrize(
    ("schedule", "counts"), [("constant", False), ("step", False), ("cosine", True), ("one-cycle", True)]
)
def test_steps_count_if_the_schedule_depends_on_the_end(schedule: Any, counts: bool) -> None:
    short, long = Recipe(steps=20, schedule=schedule), Recipe(steps=50, schedule=schedule)
    assert short.differences(long) == ({"steps": (20, 50)} if counts else {})


def test_epochs_count_if_weights_are_averaged() -> None:
    """The step at which averaging begins depends on the last step."""
    short, long = Recipe(epochs=2, average=0.5), Recipe(epochs=5, average=0.5)
    assert short.differences(long) == {"epochs": (2, 5)}
    assert long.differences(short) == {"epochs": (5, 2)}
    assert short.differences(short.replace(steps=20)) == {"steps": (0, 20)}


@pytest.mark.parametrize(
    ("average", "total", "steps"), [(0.0, 9, 0), (0.001, 9, 1), (0.25, 12, 3), (0.5, 10, 5), (1.0, 7, 7)]
)
def test_how_many_steps_are_averaged(average: float, total: int, steps: int) -> None:
    assert Recipe(average=average).averaged_steps(total) == steps


@pytest.mark.parametrize(("steps", "total"), [(0, 30), (1, 1), (29, 29), (30, 30), (31, 30)])
def test_a_run_ends_after_its_steps_or_its_epochs(steps: int, total: int) -> None:
    assert Recipe(epochs=3, steps=steps).total_steps(10) == total


def test_more_processes_than_shards() -> None:
    recipe = Recipe(shards=8)
    for size in (1, 7, 8):
        recipe.check_size(size)
    with pytest.raises(
        UsageError, match=r"^9 processes cannot share 8 shards: .*at most 8.*--shards 9 or more"
    ):
        recipe.check_size(9)


@pytest.mark.parametrize(
    "text", ["epochs = " + "1" * 5_000, "a = " + "[" * 5_000, "epochs = 1\n[model]\nx = 1"]
)
def test_toml_that_python_cannot_hold(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_recipe(str(tmp_path / "mine.toml"))


# ---- A recipe based on another ---------------------------------------------------------------------------


def recipe_files(folder: Path, **texts: str) -> Path:
    """Write these recipes, and return the path of `mine.toml`."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "mine.toml"


def test_a_base(tmp_path: Path) -> None:
    mine = recipe_files(
        tmp_path,
        mine='base = "sub/team.toml"\nepochs = 3\nlr = 1',
        sub__team='base = "more.toml"\nlr = 0.5\nseed = 7',  # relative to its own folder
        sub__more='base = "fast"\nseed = 6\nshards = 4',
    )
    assert load_recipe(str(mine)) == load_recipe("fast").replace(epochs=3, lr=1.0, seed=7, shards=4)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"mine": 'base = "fastt"'}, "mine.toml: there is no recipe 'fastt'; did you mean fast? there are"),
        ({"mine": "base = 3"}, "mine.toml: base must be the name of a recipe or a .toml file, not 3"),
        ({"mine": 'base = "mine.toml"'}, "mine.toml: its base mine.toml is based on "),
        ({"mine": 'base = "b.toml"', "b": 'base = "mine.toml"'}, "b.toml: its base mine.toml is based on "),
        ({"mine": 'base = "b.toml"', "b": "lr = 0"}, "b.toml: --lr must be above zero, not 0"),
        ({"mine": 'base = "b.toml"'}, "b.toml: no such file or directory"),
        ({"mine": 'base = "fast"\nwarmup = 1\naverage = 1'}, "mine.toml: --average must be below 1"),
        (
            {"mine": 'base = "0.toml"'} | {str(i): f'base = "{i + 1}.toml"' for i in range(8)},
            "7.toml: it is the last of 8 bases, but has a base of its own",
        ),
    ],
)
def test_impossible_bases(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(str(recipe_files(tmp_path, **texts)))
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_a_pipe_in_place_of_a_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match=r"mine\.toml: not a file$"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_types_are_checked_from_python_too() -> None:
    values: dict[str, Any] = {"batch_size": "x"}
    with pytest.raises(UsageError, match=r"^--batch-size must be a whole number, not 'x'$"):
        Recipe(**values)


def test_evaluations_count_only_if_they_choose_the_weights() -> None:
    often, seldom = Recipe(eval_every="10"), Recipe(eval_every="2 epochs")
    assert often.differences(seldom) == {}
    often, seldom = often.replace(validation=100), seldom.replace(validation=100)
    assert often.differences(seldom) == {"eval_every": ("10", "2 epochs")}
    assert often.differences(often.replace(epochs=9)) == {
        "epochs": (3, 9)
    }  # the last step is evaluated too


@pytest.mark.parametrize(
    ("validation", "images", "kept"),
    [(0, 1_100, 0), (100, 1_100, 100), (1_099, 1_100, 1_099), (0.1, 1_100, 110), (0.5, 3, 2), (1, 2, 1)],
)
def test_images_for_validation(validation: float, images: int, kept: int) -> None:
    assert Recipe(validation=validation).validation_images(images) == kept


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (1_100, "--validation 1100 leaves nothing to train on: there are 1,100 training images"),
        (10**30, f"--validation {10**30} leaves nothing to train on: there are 1,100 training images"),
        (0.9999, "--validation 0.9999 leaves nothing to train on: there are 1,100 training images"),
        (0.0001, "--validation 0.0001 is less than one of 1,100 training images"),
    ],
)
def test_a_split_that_leaves_nothing(validation: float, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(validation=validation).validation_images(1_100)
    assert str(caught.value) == message


def test_patience_needs_a_split_and_no_average() -> None:
    with pytest.raises(UsageError, match=r"^--patience needs --validation: "):
        Recipe(patience=2)
    with pytest.raises(UsageError, match=r"^--patience does not go with --average: "):
        Recipe(patience=2, validation=100, average=0.5)
