"""What other programs call a flag leads to our flag."""

import pytest

from distributed_mnist.cli.flags_train import Train
from distributed_mnist.cli.usage_errors import _flag_types
from distributed_mnist.common.suggest import _CALLED_HERE, did_you_mean
from distributed_mnist.config import Recipe, Run

COMMANDS = ["train", "evaluate", "predict", "stop", "bench", "doctor", "fetch"]


def test_each_word_leads_to_something_that_exists() -> None:
    flags = {name.removeprefix("--") for name in _flag_types(Train)}
    assert {word for word in _CALLED_HERE.values() if word} <= {*flags, *COMMANDS}
    assert not flags & set(_CALLED_HERE)


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("--learning-rate", ["--lr", "--label-smoothing"], "; did you mean --lr?"),
        ("learning_rate", ["lr", "label_smoothing"], "; did you mean lr?"),
        ("wd", ["weight_decay", "lr"], "; did you mean weight_decay?"),
        ("Batch_Sise", ["batch_size"], "; did you mean batch_size?"),
        ("wd", ["lr"], ""),
        ("--dropout", ["--out", "--lr"], ""),
        ("entirely-different", ["lr"], ""),
    ],
)
def test_suggestions(name: str, known: list[str], suggestion: str) -> None:
    assert did_you_mean(name, known) == suggestion


def test_python_names_have_the_same_suggestions() -> None:
    fields = [*Recipe.__dataclass_fields__, *Run.__dataclass_fields__]
    assert did_you_mean("gpus", fields) == "; did you mean nproc?"
    assert did_you_mean("max_epochs", fields) == "; did you mean epochs?"
