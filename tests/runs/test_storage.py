"""Full and read-only disks, writers killed at every system call, and malicious files.

Good files stay good, every problem is reported in one line, and a run resumes from the newest undamaged
checkpoint.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from ranks import Finished, environment, events, train
from torch import nn
from warm import here

from distributed_mnist.errors import CheckpointError
from distributed_mnist.optim.optimizers import Adam
from distributed_mnist.runs.checkpoint import decode, encode, load_weights
from distributed_mnist.runs.checkpoint_store import RunStore
from distributed_mnist.runs.optimizer_state import load_optimizer

CHECKPOINT, OUTPUT, TRAINING = 4, 6, 7
PATIENCE = 120.0


def refused(ended: Finished, code: int, *words: str) -> None:
    """Assert one line on standard error and the documented exit code."""
    assert ended.code == code, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended
    assert lines[0].startswith("dmnist: ")
    assert all(word in lines[0] for word in words), ended


# ---- Disks -----------------------------------------------------------------------------------------------

RECIPE = ("--recipe", "classic", "--batch-size", 11, "--epochs", 1)
"""100 steps; a checkpoint has about 95 kB."""


@dataclass(frozen=True)
class Disk:
    """A small, separate file system."""

    path: Path

    def remount(self, options: str) -> None:
        """Change it while it is in use."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self) -> Path:
        """A file that takes all the room there is."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return ballast


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Create small disks in memory, with the given options of `mount`."""
    made: list[Path] = []

    def make(options: str) -> Disk:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no `mount` here")
        if done.returncode != 0:
            pytest.skip(f"no small disk without being root: {done.stderr.strip()}")
        made.append(path)
        return Disk(path)

    yield make
    for path in made:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def flags(digits: Path) -> tuple[object, ...]:
    return ("--dataset", "idx", "--data", digits, *RECIPE)


@pytest.fixture(scope="module")
def whole(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without faults, with checkpoints after steps 60, 80 and 100."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(*flags, "--checkpoint-every", 20, nproc=1, out=out)
    return out


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def same_answer(out: Path, whole: Path) -> None:
    for name in ("weights_sha256", "samples_sha256", "test_loss", "steps"):
        assert result(out)[name] == result(whole)[name], name


def start(flags: tuple[object, ...], out: Path, *more: object) -> Finished:
    words = (
        "train",
        "--device",
        "cpu",
        "--nproc",
        1,
        *flags,
        "--checkpoint-every",
        20,
        "--out",
        out,
        *more,
    )
    return here(*words)


def steps_saved(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints, all of which must be undamaged."""
    found = []
    for path in sorted((out / "checkpoints").glob("step_*.pt")):
        content = decode(path.read_bytes(), str(path))
        assert path.name == f"step_{content['step']:08d}.pt"
        found.append(content["step"])
    return found


def test_a_disk_that_fills_up(
    disk: Callable[[str], Disk], flags: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    """There is space for two checkpoints: one to resume from, and the best one or the next one."""
    small = disk("size=256k")
    out = small.path / "out"
    ended = start(flags, out)
    assert ended.code == OUTPUT, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dmnist: trained, but ")
    assert "step_00000100.pt could not be saved: no space left on device" in line
    said = [line for line in ended.stdout.splitlines() if "could not be saved" in line]
    assert len(said) == 1, ended
    assert f"last good checkpoint: {out}/checkpoints/step_00000080.pt" in said[0]
    assert steps_saved(out) == [80]  # best.pt has the final weights
    assert [path.name for path in (out / "checkpoints").glob(".*")] == []

    small.remount("size=4m")
    again = start(flags, out, "--resume", "auto")
    assert again.code == 0, again
    assert [event["step"] for event in events(out) if event["event"] == "start"][-1] == 80
    same_answer(out, whole)
    assert steps_saved(out) == [80, 100]


def test_a_disk_with_room_for_fewer_checkpoints_than_are_kept(
    disk: Callable[[str], Disk], flags: tuple[object, ...], whole: Path
) -> None:
    """Older checkpoints make room for the best and the last one."""
    small = disk("size=400k")
    out = small.path / "out"
    ended = start(flags, out)
    assert ended.code == 0, ended
    assert "could not be saved" not in ended.stdout
    same_answer(out, whole)
    assert steps_saved(out)[-1] == 100
    assert (out / "checkpoints" / "best.pt").exists()
    (out / "result.json").unlink()
    small.fill()
    with (small.path / "ballast").open("rb+") as ballast:
        ballast.truncate(ballast.seek(0, io.SEEK_END) - 20_000)
    assert start(flags, out, "--resume", "auto", "--dry-run").code == 0  # older ones would make room


def test_a_single_failed_save(flags: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    """If one save fails but the next succeeds, the run ends well."""
    out = tmp_path / "out"
    in_the_way = out / "checkpoints" / "step_00000040.pt"
    in_the_way.mkdir(parents=True)
    (in_the_way / "mine.txt").write_text("mine")
    ended = start(flags, out, "--resume", "auto")
    assert ended.code == 0, ended
    assert ended.stdout.count("could not be saved") == 1
    same_answer(out, whole)
    assert [path.name for path in in_the_way.iterdir()] == ["mine.txt"]


def test_a_full_disk(disk: Callable[[str], Disk], flags: tuple[object, ...], tmp_path: Path) -> None:
    small = disk("size=64k")
    ballast = small.fill()
    out = small.path / "out"
    refused(start(flags, out), OUTPUT, str(out), "no space left on device")
    refused(start(flags, out, "--dry-run"), OUTPUT, str(out), "0.0 MB are free, but a checkpoint takes")
    assert list(small.path.iterdir()) == [ballast]  # no incomplete file is left


def test_a_disk_that_is_full_before_a_resume(
    disk: Callable[[str], Disk], flags: tuple[object, ...], whole: Path
) -> None:
    """A run that cannot continue on a full disk does not change existing files."""
    small = disk("size=700k")
    out = small.path / "out"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    (out / "checkpoints" / "step_00000100.pt").unlink()
    ballast = small.fill()
    before = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    assert start(flags, out, "--resume", "auto", "--dry-run").code == OUTPUT
    ended = start(flags, out, "--resume", "auto")
    assert ended.code == OUTPUT, ended
    assert "no space left on device" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before
    ballast.unlink()
    assert start(flags, out, "--resume", "auto").code == 0
    same_answer(out, whole)


def test_a_read_only_disk(
    disk: Callable[[str], Disk], flags: tuple[object, ...], whole: Path, digits: Path, tmp_path: Path
) -> None:
    """Not even root can write to it, but its files can be used."""
    only = disk("size=4m")
    out = only.path / "out"
    shutil.copytree(whole, out)
    only.remount("ro")
    refused(start(flags, only.path / "new"), OUTPUT, str(only.path / "new"), "read-only file system")
    refused(start(flags, out, "--resume", "auto"), OUTPUT, str(out), "read-only file system")
    path = out / "checkpoints" / "step_00000080.pt"
    elsewhere = start(flags, tmp_path / "elsewhere", "--resume", path)
    assert elsewhere.code == 0, elsewhere
    same_answer(tmp_path / "elsewhere", whole)
    scored = here("evaluate", path, "--dataset", "idx", "--data", digits, "--device", "cpu", "--json")
    assert scored.code == 0, scored


def test_a_folder_instead_of_the_newest_checkpoint(
    flags: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    newest = out / "checkpoints" / "step_00000100.pt"
    newest.unlink()
    newest.mkdir()
    (newest / "mine.txt").write_text("mine")
    ended = start(flags, out, "--resume", "auto")
    notes = [line for line in ended.stdout.splitlines() if line.startswith("note")]
    assert f"{newest} is a folder, not a checkpoint; trying the one before it" in notes[0]
    assert "step_00000080.pt at step 80 of 100" in notes[1]
    assert ended.code == 0, ended
    aside = newest.with_name(f"{newest.name}.before")  # renamed, but not changed
    assert (aside / "mine.txt").read_text() == "mine"
    same_answer(out, whole)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--lr", 0.5, "--lr 0.5 there, 0.001 here"), ("--model", "mlp", "--model mlp there, linear here")],
)
def test_a_checkpoint_of_another_run_among_ours(
    flag: str, value: object, said: str, flags: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    """It is undamaged, so it must not be skipped silently: the user has to decide what to do."""
    other, out = tmp_path / "other", tmp_path / "out"
    train(*flags, flag, value, nproc=1, out=other)
    shutil.copytree(whole, out)
    alien = out / "checkpoints" / "step_00000100.pt"
    shutil.copy(other / "checkpoints" / "step_00000100.pt", alien)
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    refused(start(flags, out, "--resume", "auto"), CHECKPOINT, str(alien), "a different recipe", said)
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == before


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the content of a checkpoint and give it a correct digest, as anyone can."""
    content = decode(path.read_bytes(), str(path))
    change(content)
    path.write_bytes(encode(content))


def of_the_future(content: dict[str, Any]) -> None:
    content["format"] = 2


def test_a_checkpoint_of_another_version(flags: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "checkpoints" / "step_00000100.pt"
    rewritten(path, of_the_future)
    named = start(flags, tmp_path / "elsewhere", "--resume", path)
    refused(named, CHECKPOINT, str(path), "has format 2; this version reads 1")
    ended = start(flags, out, "--resume", "auto")
    assert ended.code == 0, ended
    assert f"{path} has format 2; this version reads 1; trying the one before it" in ended.stdout
    same_answer(out, whole)


def not_a_number(content: dict[str, Any]) -> None:
    next(iter(content["model"].values())).fill_(float("nan"))


def double(content: dict[str, Any]) -> None:
    content["model"] = {key: value.double() for key, value in content["model"].items()}


def transposed(content: dict[str, Any]) -> None:
    content["model"] = {key: value.t().contiguous() for key, value in content["model"].items()}


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (not_a_number, TRAINING, "not finite"),
        (double, CHECKPOINT, "torch.float64, not torch.float32"),
        (transposed, CHECKPOINT, "(784, 10), not (10, 784)"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Any]], None],
    code: int,
    said: str,
    flags: tuple[object, ...],
    whole: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "odd.pt"
    shutil.copy(whole / "checkpoints" / "step_00000080.pt", path)
    rewritten(path, change)
    ended = start(flags, tmp_path / "out", "--resume", path)
    assert ended.code == code, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dmnist: ")
    assert said in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64], ids=str)
def test_weights_of_other_types_are_not_rounded_silently(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = {key: value.to(dtype) for key, value in before.items()}
    with pytest.raises(
        CheckpointError, match=r"^file is from a different model: weight is torch\.\w+, not torch\.float32"
    ):
        load_weights(model, other, "file")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


ODD_STATE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no average": lambda state: state.pop("exp_avg"),
    "None for an average": lambda state: state.update(exp_avg_sq=None),
    "an average of another shape": lambda state: state.update(exp_avg=torch.zeros(7)),
    "an empty step": lambda state: state.update(step=torch.zeros(0)),
    "three steps": lambda state: state.update(step=torch.zeros(3)),
    "no step": lambda state: state.pop("step"),
    "text for a step": lambda state: state.update(step="3"),
}


def adam(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0)


@pytest.mark.parametrize("odd", ODD_STATE)
def test_odd_optimizer_state_is_refused_before_the_first_step(odd: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = adam(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][1] = dict(saved["state"][1])
    ODD_STATE[odd](saved["state"][1])
    with pytest.raises(CheckpointError, match=r"^file: its optimizer state does not fit: "):
        load_optimizer(adam(model), saved, "file")


# ---- Malicious files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """Calls a function with these arguments when it is unpickled."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def hostile(trace: Path) -> dict[str, bytes]:
    """Return files that each create a file at `trace` if their code runs."""
    touch = f"open({str(trace)!r}, 'w').close()"
    kinds = {
        "exec": Calls(exec, (touch,)),
        "eval": Calls(eval, (touch.replace("'w'", "'a'"),)),
        "os.system": Calls(os.system, (f"touch '{trace}'",)),
        "subprocess": Calls(subprocess.call, (["touch", str(trace)],)),
        "a path": Calls(Path.touch, (trace,)),
    }
    files = {}
    for name, bad in kinds.items():
        buffer = io.BytesIO()
        torch.save({**fuzz.content(), "versions": bad}, buffer)
        files[name] = buffer.getvalue()
    for name, zipped in (("as a key", True), ("before torch 1.6", False)):
        buffer = io.BytesIO()
        value = {"epoch": 1, "state_dict": {}, "best_acc": 0.5, "optimizer": [kinds["exec"]]}
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        files[f"the original's, {name}"] = buffer.getvalue()
    return {**files, "pickle alone": pickle.dumps(kinds["exec"], protocol=4)}


def test_an_untrusted_file_in_a_runs_folder(flags: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    """It is read automatically because it is the newest: skipped, and no code ran."""
    trace, out = tmp_path / "was-here", tmp_path / "out"
    shutil.copytree(whole, out)
    files = hostile(trace)
    for later, data in enumerate(files.values(), start=101):
        (out / "checkpoints" / f"step_{later:08d}.pt").write_bytes(data)
    ended = start(flags, out, "--resume", "auto")
    assert not trace.exists()
    assert ended.code == 0, ended
    passed = [line for line in ended.stdout.splitlines() if "trying the one before it" in line]
    assert len(passed) == len(files)
    assert all("loading those could run code" in line for line in passed[1:]), passed
    same_answer(out, whole)
    pickle.loads(files["pickle alone"])
    assert trace.exists()  # the file is really malicious


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_untrusted_file_given_by_name(
    command: str, flags: tuple[object, ...], digits: Path, tmp_path: Path
) -> None:
    trace, path = tmp_path / "was-here", tmp_path / "stranger.pt"
    path.write_bytes(hostile(trace)["os.system"])
    if command == "train":
        ended = start(flags, tmp_path / "out", "--resume", path)
    else:
        ended = here("evaluate", path, "--dataset", "idx", "--data", digits, "--json")
    refused(ended, CHECKPOINT, str(path), "could run code")
    assert not trace.exists()


def archived(file: bytes, /, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> bytes:
    """Return the archive with some records, given by the last part of their names, replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(Path(name).stem, old.read(name)))
    return buffer.getvalue()


def number(value: int) -> bytes:
    """Return the pickled number."""
    return b"\x8a\x09" + value.to_bytes(9, "little")


@cache
def greedy() -> dict[str, bytes]:
    """Return small files that need half a gigabyte or more, or never end."""
    good = encode(fuzz.content())
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        program = archive.read("archive/data.pkl")
    shape, strides = b"K\x00K\nK\x04\x86", b"K\x04K\x01\x86"  # of 10 x 4 numbers
    assert shape in program
    assert strides in program
    size = b"K(t"  # 40 numbers
    assert size in program
    laughs = b"\x80\x02}X\x01\x00\x00\x00a)" + b"".join(
        b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
    )
    wide = b"K\x00" + number(1 << 25) + b"K\x04\x86"
    programs = {
        "a tensor longer than the file": program.replace(size, number(1 << 40) + b"t", 1),
        "a shape beyond the tensor": program.replace(shape, wide, 1),
        "one number, a hundred million times": program.replace(shape, wide, 1).replace(
            strides, b"K\x00K\x00\x86", 1
        ),
        "zeros by the hundred million": b"\x80\x02cbuiltins\nbytearray\n" + number(512 << 20) + b"\x85R.",
        "text of gigabytes": b"\x80\x02X" + (0xFFFFFFF0).to_bytes(4, "little") + b"abc.",
        "twice the one before, sixty times": laughs + b"s.",
        "brackets in brackets": b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    }
    packed = archived(good, zipfile.ZIP_DEFLATED, **{"0": bytes(200 << 20)})
    assert len(packed) < 1 << 20
    files = {name: archived(good, data=program) for name, program in programs.items()}
    return {**files, "a lot of zeros, packed": packed}


GREED = """
import sys
from pathlib import Path
from fuzz import memory
from distributed_mnist.runs.checkpoint import decode
from distributed_mnist.errors import CheckpointError
for path in sys.argv[1:]:
    before = memory()
    try:
        decode(Path(path).read_bytes(), "file")
    except CheckpointError as error:
        print(Path(path).stem, (memory() - before) >> 20, error, sep="\\t", flush=True)
"""


def test_small_files_take_little_memory_and_time(tmp_path: Path) -> None:
    paths = []
    for name, data in greedy().items():
        paths.append(tmp_path / f"{name}.pt")
        paths[-1].write_bytes(data)
    ended = subprocess.run(
        [sys.executable, "-c", GREED, *paths],
        cwd=Path(fuzz.__file__).parent,
        env=environment(),  # it imports from there
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended
    assert ended.stderr == ""
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [name for name, _, _ in lines] == list(greedy()), ended
    for name, mebibytes, said in lines:
        assert said.startswith("file "), name
        assert int(mebibytes) < 100, (name, said)


def test_a_torchscript_program_is_refused_in_one_line(flags: tuple[object, ...], tmp_path: Path) -> None:
    good, path = encode(fuzz.content()), tmp_path / "program.pt"
    path.write_bytes(good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
    refused(start(flags, tmp_path / "out", "--resume", path), CHECKPOINT, str(path))


def test_a_record_marked_as_a_folder_is_read_correctly() -> None:
    """torch's reader returns uninitialised memory for it, and the original's files have no digest."""
    data, expected = fuzz.checkpoint_files()["the original's"]
    for i in range(4):
        marked = bytearray(data)
        entry = marked.rindex(f"archive/data/{i}".encode()) - 46
        assert marked[entry : entry + 4] == b"PK\x01\x02"
        marked[entry + 38] |= 0x10
        assert fuzz.judge_checkpoint(bytes(marked), expected) == "equal"


def test_the_digest_cannot_be_removed_from_our_files(whole: Path) -> None:
    """A file in the original's format may have no digest, but not if this program wrote it."""
    data, _ = fuzz.checkpoint_files()["ours as the original's"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = archive.read("archive/data.pkl")
    renamed = archived(data, data=program.replace(b"content_sha256", b"content_sha257"))
    assert renamed != archived(data)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        decode(renamed, "file")


# ---- Killed at every system call -------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
from fuzz import content
from distributed_mnist.runs.checkpoint_store import RunStore
os.chdir(sys.argv[1])
for line in sys.stdin:
    folder, reader = Path(line.strip()), os.pipe()
    child = os.fork()
    if child == 0:
        store = RunStore(folder, keep=2)
        store.save(lambda: {**content(), "step": 2}, best=False)  # creates the writer thread
        store.finished(wait=True)
        os.close(reader[1])
        print(os.getpid(), flush=True)  # only now: strace would count the rest of this save otherwise
        os.read(reader[0], 1)  # until strace is attached
        store.save(lambda: {**content(), "step": 3}, best=True)
        saved = store.finished(wait=True)
        os._exit(0 if saved[0].problem is None else 1)
    sys.stdin.readline()
    os.close(reader[0])
    os.close(reader[1])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CALLS = (
    "openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,close,mkdir,newfstatat,"
    "fstat,stat,lseek,getdents64,ftruncate"
)
LINE = re.compile(r"(?P<pid>\d+)\s+(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<value>-?\d+)")


@dataclass
class Warm:
    """A process that has imported torch, and forks processes that write a run's third checkpoint."""

    folder: Path
    process: subprocess.Popen[str]
    made: int = 0

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def write(self, *inject: str) -> tuple[Path, int, list[str]]:
        """Write a checkpoint under strace. Return the run's folder, the writer's exit code and trace."""
        self.made += 1
        out, trace = self.folder / str(self.made), self.folder / f"{self.made}.trace"
        store = RunStore(out, keep=2)
        store.save(lambda: {**fuzz.content(), "step": 1}, best=True)
        assert [saved.problem for saved in store.finished(wait=True)] == [None]
        self.ask(str(out))
        pid = self.answer().strip()  # the second checkpoint is saved
        command = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={CALLS}", *inject]
        with subprocess.Popen([*command, "-p", pid], stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            attached = tracer.stderr.readline()
            if "attached" not in attached:
                tracer.kill()
                self.ask("go")
                pytest.skip(f"no strace of another process here: {attached.strip()}")
            self.ask("go")
            code = int(self.answer())
            tracer.wait(PATIENCE)
        return out, code, trace.read_text().splitlines()


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    here = Path(fuzz.__file__).parent
    folder = tmp_path_factory.mktemp("writers")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, here],
        cwd=here,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Warm(folder, process)
        finally:
            process.kill()


@dataclass(frozen=True)
class Call:
    """A system call by the writer."""

    name: str
    arguments: str

    def on(self, path: Path) -> bool:
        """Whether it uses this open file."""
        return f"<{path}>" in self.arguments


def calls(trace: list[str]) -> list[Call]:
    """Return the calls that succeeded, in order."""
    found = [match for line in trace if (match := LINE.match(line))]
    return [Call(match["name"], match["arguments"]) for match in found if int(match["value"]) >= 0]


def test_order_of_flush_rename_and_removal(writer: Warm) -> None:
    """A checkpoint is written, flushed and renamed, then the folder is flushed, and only then the oldest is
    removed. So a power cut at any moment leaves an undamaged newest checkpoint."""
    out, code, trace = writer.write()
    assert code == 0
    folder = out / "checkpoints"
    made = calls(trace)
    parts = {}
    for name in ("best.pt", "step_00000003.pt"):
        (rename,) = [
            i
            for i, call in enumerate(made)
            if call.name.startswith("rename") and f'{name}"' in call.arguments
        ]
        part = Path(re.findall(r'"([^"]+)"', made[rename].arguments)[0])
        assert part.parent == folder
        writes = [i for i, call in enumerate(made) if call.name == "write" and call.on(part)]
        flushes = [i for i, call in enumerate(made) if call.name == "fsync" and call.on(part)]
        assert writes, made
        assert flushes, made
        assert writes[-1] < flushes[-1] < rename
        parts[name] = rename
    folder_flushes = [i for i, call in enumerate(made) if call.name == "fsync" and call.on(folder)]
    removals = [
        i for i, call in enumerate(made) if call.name.startswith("unlink") and "step_0" in call.arguments
    ]
    assert len(removals) == 1, made
    assert "step_00000001.pt" in made[removals[0]].arguments
    assert any(parts["best.pt"] < i < parts["step_00000003.pt"] for i in folder_flushes)
    assert any(parts["step_00000003.pt"] < i < removals[0] for i in folder_flushes)


def number_of_calls(trace: list[str]) -> dict[str, int]:
    """Count the writer thread's calls by name since strace was attached."""
    names: dict[str, dict[str, int]] = {}
    for line in trace:
        if (match := re.match(r"(\d+)\s+(\w+)\(", line)) is not None:
            of_thread = names.setdefault(match[1], {})
            of_thread[match[2]] = of_thread.get(match[2], 0) + 1
    return max(names.values(), key=lambda of_thread: of_thread.get("fsync", 0))


def judge(out: Path) -> tuple[int, int]:
    """Check a folder whose writer was killed. Return the steps of its newest and its best checkpoint."""
    saved = steps_saved(out)
    assert saved in ([1, 2], [1, 2, 3], [2, 3]), saved
    best = decode((out / "checkpoints" / "best.pt").read_bytes(), "best.pt")["step"]
    assert best == 3 if saved[-1] == 3 else best in (1, 3)
    said: list[str] = []
    store = RunStore(out, keep=2)
    found = store.newest(said.append)
    assert said == []
    assert found is not None
    assert found[0].name == f"step_{saved[-1]:08d}.pt"
    assert [path.name for path in (out / "checkpoints").glob(".*")] == []
    store.save(lambda: {**fuzz.content(), "step": 4}, best=False)
    assert [done.problem for done in store.finished(wait=True)] == [None]
    assert steps_saved(out) == [saved[-1], 4]
    return saved[-1], best


@pytest.mark.slow
def test_a_writer_killed_at_every_system_call(writer: Warm) -> None:
    """The folder holds the newest checkpoint or the one before, and the earlier good files still exist."""
    _, code, trace = writer.write()
    assert code == 0
    ends: dict[str, list[tuple[int, int]]] = {}
    for name, count in number_of_calls(trace).items():
        for nth in range(1, count + 1):
            out, code, _ = writer.write("-e", f"inject={name}:signal=KILL:when={nth}")
            assert code == -9, (name, nth)
            ends.setdefault(name, []).append(judge(out))
    seen = {end for of_name in ends.values() for end in of_name}
    assert seen == {(2, 1), (2, 3), (3, 3)}, ends
    assert len(ends["fsync"]) >= 5
    assert sum(map(len, ends.values())) >= 30
