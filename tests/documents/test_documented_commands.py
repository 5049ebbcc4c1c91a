"""Run every command that the documents show, from top to bottom as a reader types them, with small data.

The commands are changed in four ways: `--dataset auto`, and every command that reads MNIST, uses 120
generated digits; N becomes 2; DIR becomes a folder; torchrun starts two processes. `ELSEWHERE` lists the
commands that cannot run here. A command that several documents show runs in the first of them.
"""

import json
import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import REPOSITORY, TORCHRUN, Program, dmnist, train
from test_documents import DOCUMENTS, blocks, examples_in
from torchrun_agents import WarmAgent

from distributed_mnist.data import datasets, idx

ELSEWHERE = {
    r"dmnist export runs/fast( +#.*)?|dmnist export runs/fast/checkpoints/.*": (
        "export/test_export.py::test_what_a_run_tells"
    ),
    r"dmnist export runs/fast --format onnx torch safetensors": (
        "export/test_export.py::test_the_same_network_gives_the_same_file"
    ),
    r"make [\w-]+( \w+=\S+)?": "documents/test_documents.py::test_make_targets_exist",
    r"pip install .*": "test_packaging.py::test_installed_alone_it_trains",
    r"dmnist (train .* --detach|watch runs/background|stop .*)": (
        "cli/test_stop.py::test_a_run_in_the_background_is_stopped_and_comes_to_the_same"
    ),
    r"dmnist data import .*": "data_import/test_import.py::test_a_format_gives_what_was_written",
    r"kill -9 PID": "launcher/test_restart.py::test_one_rank_is_killed",
    r"dmnist bench": "bench/test_bench.py::test_startup",
    r"dmnist bench scaling": "bench/test_bench.py::test_scaling",
    r"dmnist bench startup .* --out DIR": (
        "bench/test_bench_on_gpus.py::test_scaling_compares_graphs_with_eager_steps"
    ),
    r"dmnist verify( --minutes \d+ --json)?": (
        "verify/test_known_answer.py::test_two_ranks_find_a_wrong_sum_and_name_the_link"
    ),
    r"dmnist verify --inject .*": (
        "verify/test_known_answer.py::test_a_single_process_names_a_weight_that_changed_in_memory"
    ),
    r"dmnist verify --sync tree": "verify/test_tree.py::test_a_correct_machine_passes",
    r"dmnist verify( --nproc 4)? --chaos": "verify/test_chaos.py::test_a_few_faults_change_no_answer",
    r"srun .* dmnist train .*": "launchers/test_slurm.py::test_requeued_at_the_time_limit",
    r"srun -n 8 dmnist doctor": "launchers/test_slurm.py::test_the_job_is_examined",
    r"srun -n 8 dmnist verify": (
        "verify/test_known_answer.py::test_two_ranks_find_a_wrong_sum_and_name_the_link"
    ),
    r"(sbatch|scancel) .*|tail -F slurm-JOBID\.out": (
        "launchers/test_slurm.py::test_requeued_at_the_time_limit"
    ),
    r"mpirun .*": "launchers/test_mpi.py::test_mpirun",
    r"docker .*": "deploy/test_image.py::test_the_image_copies_what_is_there_and_no_more",
    r"(sed .* \| )?kubectl .*": "deploy/test_manifests.py::test_kubernetes_objects_fit_their_schema",
    r"python deploy/ray/train\.py .*": "deploy/test_image.py::test_two_workers_of_ray",
    r"torchrun --nnodes 2 .*": "launchers/test_hosts.py::test_torchrun",
    r"torchrun --nnodes 1:4 .*|export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": (
        "launchers/test_elastic.py::test_members_come_and_go"
    ),
    r"python (-m torch\.distributed\.launch .*)?multi_proc_single_gpu\.py .*": (
        "cli/test_original_script.py::test_evaluate"
    ),
    r"export ATEN_CPU_CAPABILITY=\S+ ONEDNN_MAX_CPU_ISA=\S+ MKL_CBWR=\S+": (
        "common/test_compute_platform.py::test_limits_make_processors_alike"
    ),
    r"tensorboard --logdir runs": "reporting/test_tensorboard.py::test_tensorboard_shows_it",
}
"""Patterns of commands that cannot run here, each with the test in `tests/` that runs a similar command."""
READ_DATA = ("train", "evaluate", "doctor")
"""The commands that have the flag `--dataset`."""


def commands(path: Path) -> list[str]:
    """Return the command lines in a document's blocks, without comments and `.venv/bin/`."""
    found = []
    for language, content in blocks(path.read_text()):
        if language:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].replace(".venv/bin/", "").split()
            found.append(" ".join(words))
    return [line for line in found if line]


def covering_test(line: str) -> str | None:
    """Return the test that runs a command similar to this one, or None if this file runs it."""
    return next((test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, line)), None)


WITH_COMMANDS = [path for path in (*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md") if commands(path)]
SHOWN_BY = {line: path for path in reversed(WITH_COMMANDS) for line in commands(path)}
"""The first document that shows a command."""


def to_run(path: Path) -> list[str]:
    """Return the commands of a document that this file runs."""
    return [line for line in commands(path) if not covering_test(line) and SHOWN_BY[line] == path]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 120 + 40 generated digits: how well a run learns does not matter here."""
    folder = tmp_path_factory.mktemp("few")
    datasets.write(datasets.load("generated", Path(), train_size=120, test_size=40), folder)
    return folder


@pytest.fixture(scope="module")
def trained(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for documents that use one without showing how it was made."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train("--dataset", "idx", "--data", few, "--recipe", "fast", nproc=2, out=out)
    return out


def prepare(folder: Path, text: str, digits: Path) -> None:
    """Write the files that a reader of this text has: data, pictures, and the examples."""
    shutil.copytree(digits, folder / "data")
    shutil.copytree(digits, folder / "my_data")
    examples_in(folder, text)
    images = idx.read(next(digits.glob("t10k-images*")))
    (folder / "pictures").mkdir()
    for name in ("photo.jpg", "scan.png", "pictures/a.png"):
        Image.fromarray(255 - np.kron(images[1], np.ones((5, 5), np.uint8))).save(folder / name)
    shutil.copy(next(digits.glob("t10k-images*")), folder / "t10k-images-idx3-ubyte.gz")


def for_small_data(words: list[str], folder: Path) -> list[str]:
    """Change the words of a `dmnist` command as the module docstring describes."""
    words = ["2" if word == "N" else "data" if word == "DIR" else word for word in words]
    if "--dataset" in words:
        words[words.index("--dataset") + 1] = "idx"
    elif words[0] in READ_DATA:
        words += ["--dataset", "idx"]
    if words[0] in (*READ_DATA, "predict"):
        words += ["--device", "cpu"]
    for i, word in enumerate(words):
        if "step_" in word:  # the documents show the last step of a run on the full data
            words[i] = str(max((folder / word).parent.glob("step_*")))
    return words


def missing_runs(words: list[str]) -> list[str]:
    """Return the run folders that a command reads and that do not exist."""
    read = [word for word, before in zip(words[1:], words, strict=False) if before != "--out"]
    return [word for word in read if re.fullmatch(r"runs/[\w-]+", word) and not Path(word).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*filter(to_run, WITH_COMMANDS)], ids=lambda path: path.name)
def test_commands(
    path: Path, few: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, path.read_text(), few)
    for line in to_run(path):
        words = shlex.split(line)
        for name in missing_runs(words):
            shutil.copytree(trained, tmp_path / name)
        if words[0] == "dmnist":
            ended = dmnist(*for_small_data(words[1:], tmp_path))
        else:
            assert words[0] == "torchrun", f"{path.name} shows {line!r}: nothing here runs it"
            program = words.index("distributed_mnist" if "distributed_mnist" in words else "dmnist")
            arguments = for_small_data(words[program + 1 :], tmp_path)
            options = words[1 : program - (words[program] == "distributed_mnist")]  # without `-m`
            options[options.index("--nproc-per-node") + 1] = "2"
            start = Program if path.name == "faults.md" else WarmAgent  # fresh processes once
            command = (*TORCHRUN, *options, "-m", "distributed_mnist", *arguments)
            with start(command, cwd=tmp_path) as agent:
                ended = agent.finish()
        assert ended.code == 0, (line, ended)
    require_same_weights(tmp_path)


def require_same_weights(folder: Path) -> None:
    """Runs with the same recipe and data set have the same weights, however they were started."""
    found: dict[str, set[str]] = defaultdict(set)
    for result in folder.glob("runs/*/result.json"):
        config: dict[str, Any] = json.loads((result.parent / "config.json").read_text())
        digest = json.loads(result.read_text())["weights_sha256"]
        found[json.dumps([config["recipe"], config["dataset"]])].add(digest)
    assert all(len(digests) == 1 for digests in found.values()), found


def test_commands_tested_elsewhere_have_their_test() -> None:
    """Every pattern matches a command that a document shows, and every test that it names exists."""
    shown = [line for path in WITH_COMMANDS for line in commands(path)]
    for pattern, test in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, line) for line in shown), f"no document shows {pattern}"
        file, name = test.split("::")
        assert f"\ndef {name}(" in (REPOSITORY / "tests" / file).read_text(), test
