"""Users' mistakes: one line on standard error, the documented exit code, and no half-written files."""

import fcntl
import gzip
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import DMNIST, REPOSITORY, Finished, WarmProgram, dmnist_ranks, free_port, run, train
from warm import here

from distributed_mnist.data import datasets, idx

USAGE, DATA, CHECKPOINT, LAUNCH, OUTPUT, TRAINING = 2, 3, 4, 5, 6, 7
RECIPE = ("--recipe", "classic", "--epochs", 1, "--batch-size", 128)


@pytest.fixture(scope="module")
def good(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the small data set."""
    out = tmp_path_factory.mktemp("good") / "out"
    train("--dataset", "idx", "--data", digits, *RECIPE, nproc=1, out=out)
    return out


@pytest.fixture(scope="module")
def checkpoint(good: Path) -> Path:
    return good / "checkpoints" / "step_00000009.pt"


def refused(ended: Finished, code: int, *words: str) -> str:
    """Check that a command was refused in one line with these words. Returns the line."""
    assert ended.code == code, ended
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended
    assert lines[0].startswith("dmnist: ")
    for word in words:
        assert word in lines[0], ended
    return lines[0]


def nothing_in(folder: Path) -> None:
    """Check that a run that never started has not created a folder."""
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == []


def test_a_wrong_flag_on_one_rank_ends_all() -> None:
    """Started by a launcher that does not end the others itself. Before, they waited for five minutes."""
    variables: dict[str, Any] = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    words = (*DMNIST, "train", "--dataset", "generated", "--device", "cpu")
    with (
        WarmProgram(words, cwd=None, RANK="0", **variables) as first,
        WarmProgram((*words, "--epochs", "0"), cwd=None, RANK="1", **variables) as second,
    ):
        refused(second.finish(), USAGE, "--epochs", "at least 1")
        refused(first.finish(), USAGE, "dmnist: rank 1 (pid ", " cannot take part: --epochs")


# ---- Flags -----------------------------------------------------------------------------------------------

FLAGS = [
    ("--epochs 0", ["--epochs", "at least 1", "0"]),
    ("--epochs -3", ["--epochs", "-3"]),
    ("--epochs 1.5", ["--epochs must be a whole number, not '1.5'"]),
    ("--epochs " + "1" * 5_000, ["--epochs must be a whole number, not '111"]),
    ("--checkpoint-every " + "1" * 5_000, ["--checkpoint-every must be like '5 seconds'"]),
    ("--epochs many", ["--epochs", "many"]),
    ("--epochs", ["--epochs needs a value"]),
    ("--batch-size 0", ["--batch-size", "at least 1"]),
    ("--lr 0", ["--lr", "above zero"]),
    ("--lr -0.1", ["--lr", "above zero"]),
    ("--lr nan", ["--lr", "nan"]),
    ("--lr inf", ["--lr", "inf"]),
    ("--lr fast", ["--lr must be a number, not 'fast'"]),
    ("--seed -1", ["--seed", "-1"]),
    ("--seed 9223372036854775808", ["--seed"]),
    ("--shards 0", ["--shards", "at least 1"]),
    ("--nproc 0", ["--nproc", "at least 1"]),
    ("--nproc two", ["--nproc", "two"]),
    ("--sync ring", ["--sync must be tree or ddp, not 'ring'"]),
    ("--precision fp8", ["--precision", "fp8"]),
    ("--optimizer lion", ["there is no optimizer 'lion'"]),
    ("--schedule linear", ["--schedule", "linear"]),
    ("--device tpu", ["--device", "tpu"]),
    ("--beta1 1", ["--beta1", "below 1"]),
    ("--momentum 1", ["--momentum"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--label-smoothing 1", ["--label-smoothing"]),
    ("--warmup 1.1", ["--warmup", "between 0 and 1"]),
    ("--shift -1", ["--shift"]),
    ("--scale 1", ["--scale"]),
    ("--decay-every 0", ["--decay-every"]),
    ("--decay-factor 0", ["--decay-factor"]),
    ("--checkpoint-every 0", ["--checkpoint-every"]),
    ("--checkpoint-every soon", ["--checkpoint-every", "soon"]),
    ("--eval-every -1", ["--eval-every"]),
    ("--keep 0", ["--keep"]),
    ("--train-size 0", ["--train-size"]),
    ("--test-size 0", ["--test-size"]),
    ("--data-seed -1", ["--data-seed"]),
    ("--micro-batch 0", ["--micro-batch"]),
    ("--recipe nonsense", ["nonsense", "classic", "default"]),
    ("--recipe", ["--recipe"]),
    ("--recipe missing.toml", ["missing.toml"]),
    ("--recipe .", ["--recipe .: there is no run in ., which has no config.json"]),
    ("--no-such-flag", ["train has no flag --no-such-flag", "--help"]),
    ("--epcohs 12345", ["train has no flag --epcohs; did you mean --epochs?"]),
    ("--epcohs=12345", ["train has no flag --epcohs; did you mean --epochs?"]),
    ("--batchsize 64", ["did you mean --batch-size?"]),
    ("--learning_rate 0.1", ["train has no flag --learning_rate; did you mean --lr?"]),
    ("--gpus 2", ["train has no flag --gpus; did you mean --nproc?"]),
    ("--amp", ["train has no flag --amp; did you mean --precision?"]),
    ("--dropout 0.1", ["train has no flag --dropout (dmnist"]),
    ("--tensorboard=False", ["--tensorboard takes no value: give it alone, or leave it out"]),
    ("--tensorboard False", ["--tensorboard takes no value: give it alone, or leave it out"]),
    ("--dataset MNIST", ["there is no data set 'MNIST'; did you mean mnist?"]),
    ("-n 3", ["train has no flag -n"]),
    ("--lr --seed 3", ["--lr needs a value"]),
    ("surplus", ["'surplus'"]),
    ("--dataset minst", ["there is no data set 'minst'; did you mean mnist?", "kmnist", "generated"]),
    ("--train-size 5000", ["--train-size only goes with --dataset generated"]),
    ("--data-seed 5", ["--data-seed only goes with --dataset generated"]),
    ("--model nonsense", ["nonsense", "linear", "mlp", "cnn"]),
    ("--model user_models:nonsense", ["user_models:nonsense"]),
    ("--model no.such.module:factory", ["no.such.module"]),
    ("--model user_models:nn", ["user_models:nn", "not callable"]),
    ("--model user_models:BatchMean", ["user_models:BatchMean", "depend on the others in its batch"]),
    ("--model user_models:batch_norm --ema 0.9", ["user_models:batch_norm", "use --average"]),
    ("--model user_models:batch_norm --sync ddp", ["user_models:batch_norm", "use --sync tree"]),
    (
        "--model user_models:batch_norm --batch-size 121",
        ["a batch of 11 (the last of an epoch) cut into 8 shards", "--batch-size or fewer --shards"],
    ),
    ("--model user_models:eleven_classes", ["user_models:eleven_classes", "11", "10"]),
    ("--model user_models:Leaving", ["the model ended the program with sys.exit(0)"]),
    ("--resume auto", ["--resume auto", "--out"]),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_bad_flags_of_train(
    flags: str, words: list[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before any folder is created, in `--out` or under `runs`."""
    monkeypatch.chdir(tmp_path)
    out = () if flags == "--resume auto" else ("--out", tmp_path / "out")
    alone = () if "--nproc" in flags else ("--nproc", 1)
    words_given = ("train", "--device", "cpu", "--dataset", "idx", "--data", digits, *alone, *out, "--json")
    if "--device" in flags:
        words_given = tuple(word for word in words_given if word not in ("--device", "cpu"))
    refused(here(*words_given, *flags.split()), USAGE, *words)
    nothing_in(tmp_path)


def test_a_folder_whose_name_is_too_long(digits: Path, tmp_path: Path) -> None:
    words = ("train", "--device", "cpu", "--dataset", "idx", "--data", digits, "--nproc", 1, "--json")
    ended = here(*words, "--out", tmp_path / ("a" * 300))
    assert len(ended.stderr) < 500
    refused(ended, OUTPUT, "a: file name too long")
    nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [],
            [
                "train, evaluate, predict, report, watch, stop, export, verify, doctor, bench or data",
                "--help",
            ],
        ),
        (
            ["trian"],
            ["there is no command 'trian'; did you mean train? there are train, evaluate, predict"],
        ),
        (["test"], ["there is no command 'test'; did you mean evaluate?"]),
        (["--nproc", "2", "train"], ["--nproc must come after a command"]),
        (["evaluate"], ["evaluate needs a CHECKPOINT", "folder"]),
        (["evaluate", "a.pt", "b.pt"], ["'b.pt'"]),
        (["evaluate", "a.pt", "--dataset", "kminst"], ["'kminst'; did you mean kmnist?"]),
        (["evaluate", "a.pt", "--nproc", "0"], ["--nproc", "at least 1"]),
        (["data"], ["data fetch, data check, data import or data generate", "--help"]),
        (
            ["data", "fetsh"],
            ["there is no command 'data fetsh'; did you mean fetch? there are data fetch, data check,"],
        ),
        (["data", "fetch", "generated"], ["have no files"]),
        (["data", "fetch", "--mirror", "http://a", "http://b"], ["there is no data set 'http://b'"]),
        (["data", "check", "."], ["there is no data set '.': for your own files, use idx --data ."]),
        (["data", "check", "cifar"], ["there is no data set 'cifar'; there are mnist"]),
        (
            ["data", "fetch", "--mirror", "a", "b", "--jsno"],
            ["data fetch has no flag --jsno; did you mean"],
        ),
        (["data", "generate"], ["data generate needs a folder to write to"]),
        (["data", "import"], ["data import needs a file or folder to import"]),
        (
            ["data", "generate", "there", "--test-size", "9", "--train-size", "9", "--data-seed", "-1"],
            ["seed"],
        ),
    ],
    ids=" ".join,
)
def test_bad_commands(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(here(*words), USAGE, *expected)
    nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = 0", ["mine.toml", "--epochs"]),
        ("epochs = 'two'", ["mine.toml", "epochs", "two"]),
        ("epoch = 2", ["mine.toml", "'epoch'"]),
        ("sync = 'ring'", ["mine.toml", "ring"]),
        ("epochs = ", ["mine.toml", "TOML"]),
    ],
)
def test_bad_recipes(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    ended = here("train", "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "out", "--json")
    refused(ended, USAGE, *words)
    assert not (tmp_path / "out").exists()


def test_a_size_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here("data", "generate", "there", "--train-size", 0)
    refused(ended, USAGE, "--train-size must be at least 1, not 0")
    nothing_in(tmp_path)


# ---- Data ------------------------------------------------------------------------------------------------


def start(digits: Path, out: Path, *more: object) -> Finished:
    words = ("train", "--device", "cpu", "--nproc", 1, "--dataset", "idx", "--data", digits, "--out", out)
    return here(*words, *RECIPE, *more, "--json")


def test_an_unknown_data_set(tmp_path: Path) -> None:
    ended = start(tmp_path, tmp_path / "out", "--dataset", "cifar")
    refused(ended, USAGE, "cifar", "mnist")
    nothing_in(tmp_path)


def test_a_missing_data_folder(tmp_path: Path) -> None:
    refused(start(tmp_path / "nowhere", tmp_path / "out"), DATA, str(tmp_path / "nowhere"))
    nothing_in(tmp_path)


def test_no_run_under_runs_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here(
        "train", "--device", "cpu", "--nproc", 1, "--dataset", "idx", "--data", "nowhere", "--json"
    )
    refused(ended, DATA, "nowhere")
    assert list(tmp_path.glob("runs/*")) == []


def test_an_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    refused(start(tmp_path / "data", tmp_path / "out"), DATA, str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> Path:
    """A copy of the small data set, to be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(digits, folder)
    return folder


def test_a_truncated_file(spoilt: Path, tmp_path: Path) -> None:
    path = spoilt / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    refused(start(spoilt, tmp_path / "out"), DATA, path.name)
    assert not (tmp_path / "out").exists()


def test_images_of_another_shape(spoilt: Path, tmp_path: Path) -> None:
    path = spoilt / "train-images-idx3-ubyte.gz"
    idx.write(path, np.zeros((1_100, 32, 32), np.uint8))
    refused(start(spoilt, tmp_path / "out"), DATA, path.name, "32", "28")
    assert not (tmp_path / "out").exists()


def test_fewer_labels_than_images(spoilt: Path, tmp_path: Path) -> None:
    path = spoilt / "train-labels-idx1-ubyte.gz"
    idx.write(path, np.zeros(1_099, np.uint8))
    refused(start(spoilt, tmp_path / "out"), DATA, path.name, "1099", "1100")
    assert not (tmp_path / "out").exists()


def test_a_wrong_magic_number(spoilt: Path, tmp_path: Path) -> None:
    path = spoilt / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">II", 0x0DEADBEE, 300) + bytes(300)))
    refused(start(spoilt, tmp_path / "out"), DATA, path.name)


# ---- Checkpoints -----------------------------------------------------------------------------------------


def test_resume_from_nothing(digits: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pt"
    refused(start(digits, tmp_path / "out", "--resume", missing), CHECKPOINT, str(missing), "no such file")
    nothing_in(tmp_path)


def test_resume_from_a_folder(digits: Path, good: Path, tmp_path: Path) -> None:
    refused(start(digits, tmp_path / "out", "--resume", good), CHECKPOINT, str(good), "folder")
    nothing_in(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped", "pickle", "other"])
def test_resume_from_a_corrupt_checkpoint(
    damage: str, digits: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.pt"
    data = bytearray(checkpoint.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-500])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "pickle":
        torch.save({"model": Path("/")}, path)
    else:
        torch.save([1, 2, 3], path)
    refused(start(digits, tmp_path / "out", "--resume", path), CHECKPOINT, str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", "0.5"), ["a different recipe", "--lr 0.001 there, 0.5 here"]),
        (("--seed", "7"), ["--seed 0 there, 7 here"]),
        (("--shards", "4"), ["--shards 8 there, 4 here"]),
        (("--batch-size", "64"), ["--batch-size 128 there, 64 here"]),
        (("--model", "mlp"), ["--model linear there, mlp here"]),
        (("--lr", "0.5", "--seed", "7"), ["--lr", "--seed"]),
        (("--sync", "ddp"), ["--sync tree there, ddp here"]),
    ],
)
def test_resume_with_another_recipe(
    flags: tuple[str, ...], words: list[str], digits: Path, checkpoint: Path, tmp_path: Path
) -> None:
    refused(start(digits, tmp_path / "out", *flags, "--resume", checkpoint), CHECKPOINT, *words)
    nothing_in(tmp_path)


def test_resume_with_other_data(checkpoint: Path, tmp_path: Path) -> None:
    datasets.write(
        datasets.load("generated", Path(), seed=1, train_size=1_100, test_size=300), tmp_path / "data"
    )
    ended = start(tmp_path / "data", tmp_path / "out", "--resume", checkpoint)
    refused(ended, CHECKPOINT, str(checkpoint), "different data")
    assert not (tmp_path / "out").exists()


def test_auto_with_other_data_leaves_the_run_alone(good: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(good, copy)
    before = contents(copy)
    datasets.write(
        datasets.load("generated", Path(), seed=1, train_size=1_100, test_size=300), tmp_path / "data"
    )
    refused(start(tmp_path / "data", copy, "--resume", "auto"), CHECKPOINT, "different data")
    assert contents(copy) == before


def contents(folder: Path) -> dict[str, bytes]:
    """The content of a run's files, except those that record who used the folder last."""
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", ".group")
    }


def test_evaluate_nothing(digits: Path, tmp_path: Path) -> None:
    ended = here("evaluate", tmp_path / "missing.pt", "--data", digits, "--json")
    refused(ended, CHECKPOINT, str(tmp_path / "missing.pt"))


def test_evaluate_a_corrupt_checkpoint(digits: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(checkpoint.read_bytes()[:-500])
    refused(here("evaluate", path, "--data", digits, "--json"), CHECKPOINT, str(path), "damaged")


def test_evaluate_without_the_data(checkpoint: Path, tmp_path: Path) -> None:
    refused(
        here("evaluate", checkpoint, "--data", tmp_path / "gone", "--json"), DATA, str(tmp_path / "gone")
    )


# ---- Processes -------------------------------------------------------------------------------------------


def test_more_processes_than_shards(digits: Path, tmp_path: Path) -> None:
    words = ("train", "--device", "cpu", "--nproc", 3, "--shards", 2, "--dataset", "idx", "--data", digits)
    ended = here(*words, "--out", tmp_path / "out", "--json")
    refused(ended, USAGE, "3 processes", "2 shards", "--shards 3")
    nothing_in(tmp_path)


def test_one_line_for_a_group_of_three(tmp_path: Path) -> None:
    """Rank 0 reports an error that all ranks have."""
    words = ("train", "--device", "cpu", "--nproc", 3, "--dataset", "idx", "--data", tmp_path / "nowhere")
    with WarmProgram([*DMNIST, *words, "--out", tmp_path / "out", "--json"]) as program:
        refused(program.finish(), DATA, str(tmp_path / "nowhere"))
    nothing_in(tmp_path)


def test_one_line_for_a_resume_by_a_group(digits: Path, tmp_path: Path) -> None:
    words = ("train", "--device", "cpu", "--nproc", 2, "--dataset", "idx", "--data", digits)
    ended = here(*words, "--resume", "gone.pt", "--out", tmp_path / "out", "--json")
    refused(ended, CHECKPOINT, "gone.pt")
    nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"LOCAL_RANK": "1"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}, "RANK is 2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_JOB_ID is not set"),
    ],
)
def test_half_an_environment(variables: dict[str, str], word: str, tmp_path: Path) -> None:
    for command in (["train", "--out", tmp_path / "out"], ["evaluate", tmp_path / "some.pt"]):
        refused(here(*command, "--json", **variables), LAUNCH, word)
    nothing_in(tmp_path)


def test_nproc_under_another_launcher(tmp_path: Path) -> None:
    variables: dict[str, Any] = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [{**variables, "RANK": rank} for rank in ("0", "1")]
    for ended in dmnist_ranks(ranks, "train", "--nproc", 2, "--out", tmp_path / "out", "--json"):
        refused(ended, USAGE, "--nproc 2")
    nothing_in(tmp_path)


# ---- Output ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run(digits: Path, good: Path) -> None:
    before = contents(good)
    refused(start(digits, good), OUTPUT, str(good), "already holds a run", "--resume auto")
    assert contents(good) == before


def test_a_folder_in_use(digits: Path, tmp_path: Path) -> None:
    """The test takes the kernel's lock in the same way as a live run."""
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("pid 4711 on elsewhere")
        lock.flush()
        refused(start(digits, out), OUTPUT, str(out), "in use", "pid 4711 on elsewhere")
        refused(start(digits, out, "--resume", "auto"), OUTPUT, "in use")
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert start(digits, out).code == 0  # the lock was released with its owner


def test_a_file_in_the_way(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    refused(start(digits, tmp_path / "out"), OUTPUT, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "precious"


def test_a_file_above_in_the_way(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(start(digits, tmp_path / "file" / "out"), OUTPUT, str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_something_in_the_way_inside(name: str, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if name == "checkpoints":
        out.mkdir()
        (out / name).write_text("precious")
    else:
        (out / name).mkdir(parents=True)
    refused(start(digits, out), OUTPUT, str(out / name))


def test_a_folder_that_cannot_be_written(digits: Path) -> None:
    """Not even root can create a folder in /proc."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    refused(start(digits, Path("/proc/dmnist/out")), OUTPUT, "/proc/dmnist/out")


def test_a_loss_that_is_not_finite(digits: Path, tmp_path: Path) -> None:
    """The error names the step and the last good checkpoint. The run's folder has the details."""
    out = tmp_path / "out"
    flags = ("--model", "mlp", "--optimizer", "sgd", "--lr", "1e30")
    ended = start(digits, out, *flags)
    assert ended.code == TRAINING, ended
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("dmnist: ")]
    assert "step 2" in line or "step 3" in line
    assert "last good checkpoint: none" in line
    assert not (out / "result.json").exists()


def test_debug_shows_where(tmp_path: Path) -> None:
    ended = here(
        "train",
        "--nproc",
        1,
        "--data",
        tmp_path / "no",
        "--dataset",
        "idx",
        "--out",
        tmp_path / "o",
        "--debug",
    )
    assert ended.code == DATA
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("dmnist: ")


def test_a_fresh_program_says_the_same(tmp_path: Path) -> None:
    """The other tests run in processes forked from a server with warm imports. This one does not."""
    ended = run([*DMNIST, "train", "--recipe", "nonsense", "--json"], cwd=tmp_path)
    refused(ended, USAGE, "there is no recipe 'nonsense'")
    nothing_in(tmp_path)


def test_the_original_script_without_torch(tmp_path: Path) -> None:
    """With -S, Python does not see the installed packages."""
    ended = run(
        [sys.executable, "-S", REPOSITORY / "multi_proc_single_gpu.py", "--epochs", 1], cwd=tmp_path
    )
    line = refused(ended, LAUNCH, "torch, numpy, rich, requests, tyro are not installed for this python")
    assert line.endswith("run `make setup`, then .venv/bin/python multi_proc_single_gpu.py ...")
    nothing_in(tmp_path)


def test_the_original_script_interrupted(tmp_path: Path) -> None:
    """Interrupted while it looks for packages."""
    program = (
        "import sys, importlib.util, multi_proc_single_gpu as script\n"
        "def interrupted(name): raise KeyboardInterrupt\n"
        "script.find_spec, sys.argv = interrupted, ['script']\n"
        "sys.exit(script.main())"
    )
    ended = run([sys.executable, "-c", program], cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert ended.code == 130, ended
    assert "Traceback" not in ended.stderr
