"""Every command that the documents show, run from top to bottom as a reader types them, with small data.

What is changed: `--dataset auto`, and whatever reads MNIST, takes 1,100 drawn digits; N is 2, and DIR a
folder. What cannot be run here line by line is in `ELSEWHERE`, with the test that runs its like.
"""

import importlib
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
from ranks import REPOSITORY, TORCHRUN, dmnist, run, train
from test_documents import DOCUMENTS, blocks, examples_in

from distributed_mnist.data import idx

ELSEWHERE = {
    r"make \w+( +#.*)?": "test_documents.test_what_make_is_asked_for_it_makes",
    r"pip install .*": "test_packaging.test_installed_alone_it_trains",
    r"kill -9 PID": "test_restart.test_one_is_killed",
    r"dmnist bench": "test_bench.test_startup",
    r"dmnist bench scaling": "test_bench.test_scaling",
    r"dmnist verify": "test_verify.test_a_sound_machine_passes",
    r"dmnist verify( --nproc 4)? --chaos": "test_chaos.test_a_short_soak",
    r"srun .* dmnist train .*": "test_slurm.test_srun_on_two_nodes",
    r"srun -n 8 dmnist (doctor|verify)": "test_slurm.test_the_job_is_examined",
    r"(sbatch|scancel) .*|tail -F slurm-JOBID\.out": "test_slurm.test_goes_on_by_itself",
    r"mpirun .*": "test_mpi.test_mpirun",
    r"docker .*": "test_deploy_image.test_the_image_copies_what_is_there_and_no_more",
    r"(sed .* \| )?kubectl .*": "test_deploy.test_kubernetes_objects_fit_their_schema",
    r"python deploy/ray/train\.py .*": "test_deploy_image.test_two_workers_of_ray",
    r"torchrun --nnodes 2 .*": "test_hosts.test_torchrun",
    r"torchrun --nnodes 1:4 .*|export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": (
        "test_elastic.test_members_come_and_go"
    ),
    r"python (-m torch\.distributed\.launch .*)?multi_proc_single_gpu\.py .*": (
        "test_original_script.test_evaluate"
    ),
    r"tensorboard --logdir runs": "test_tensorboard.test_tensorboard_shows_it",
}
OF_DATA = ("train", "evaluate", "doctor")


def commands(path: Path) -> list[str]:
    """The lines of a document's blocks of commands, without comments and `.venv/bin/`."""
    found = []
    for language, content in blocks(path.read_text()):
        if language:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].replace(".venv/bin/", "").split()
            found.append(" ".join(words))
    return [line for line in found if line]


def elsewhere(line: str) -> str | None:
    return next((test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, line)), None)


WITH_COMMANDS = [path for path in (*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md") if commands(path)]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, for documents that speak of one without saying where it comes from."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train("--dataset", "idx", "--data", digits, "--recipe", "fast", nproc=2, out=out)
    return out


def workplace(folder: Path, text: str, digits: Path) -> None:
    """What a reader of this text has before him: data, pictures, and the examples in files."""
    shutil.copytree(digits, folder / "data")
    shutil.copytree(digits, folder / "my_data")
    examples_in(folder, text)
    images = idx.read(next(digits.glob("t10k-images*")))
    (folder / "pictures").mkdir()
    for name in ("photo.jpg", "scan.png", "pictures/a.png"):
        Image.fromarray(255 - np.kron(images[1], np.ones((5, 5), np.uint8))).save(folder / name)
    shutil.copy(next(digits.glob("t10k-images*")), folder / "t10k-images-idx3-ubyte.gz")


def for_small_data(words: list[str], folder: Path) -> list[str]:
    """The words of a `dmnist` command, changed as said above."""
    words = ["2" if word == "N" else "data" if word == "DIR" else word for word in words]
    if "--dataset" in words:
        words[words.index("--dataset") + 1] = "idx"
    elif words[0] in OF_DATA:
        words += ["--dataset", "idx"]
    if words[0] in (*OF_DATA, "predict"):
        words += ["--device", "cpu"]
    for i, word in enumerate(words):
        if "step_" in word:  # of the full data
            words[i] = str(max((folder / word).parent.glob("step_*")))
    return words


def missing_runs(words: list[str]) -> list[str]:
    """Runs that a command reads and that nobody has made."""
    read = [word for word, before in zip(words[1:], words, strict=False) if before != "--out"]
    return [word for word in read if re.fullmatch(r"runs/[\w-]+", word) and not Path(word).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_commands(
    path: Path, digits: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workplace(tmp_path, path.read_text(), digits)
    for line in commands(path):
        if elsewhere(line):
            continue
        words = shlex.split(line)
        for name in missing_runs(words):
            shutil.copytree(trained, tmp_path / name)
        if words[0] == "dmnist":
            ended = dmnist(*for_small_data(words[1:], tmp_path))
        else:
            assert words[0] == "torchrun", f"{path.name} shows {line!r}: nothing here runs it"
            at = words.index("distributed_mnist" if "distributed_mnist" in words else "dmnist")
            arguments = for_small_data(words[at + 1 :], tmp_path)
            options = words[1 : at - (words[at] == "distributed_mnist")]
            ended = run([*TORCHRUN, *options, "-m", "distributed_mnist", *arguments], cwd=tmp_path)
        assert ended.code == 0, (line, ended)
    one_answer(tmp_path)


def one_answer(folder: Path) -> None:
    """Runs of one recipe on one data set ended with the same weights, however they were started."""
    found: dict[str, set[str]] = defaultdict(set)
    for place in folder.glob("runs/*/result.json"):
        told: dict[str, Any] = json.loads((place.parent / "config.json").read_text())
        digest = json.loads(place.read_text())["weights_sha256"]
        found[json.dumps([told["recipe"], told["dataset"]])].add(digest)
    assert all(len(digests) == 1 for digests in found.values()), found


def test_what_is_run_elsewhere_is() -> None:
    shown = [line for path in WITH_COMMANDS for line in commands(path)]
    for pattern, test in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, line) for line in shown), f"nothing is like {pattern}"
        module, name = test.split(".")
        assert callable(getattr(importlib.import_module(module), name)), test
