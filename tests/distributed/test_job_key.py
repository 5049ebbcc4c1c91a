"""The secret of a job: where it comes from, and what is refused."""

import os
from pathlib import Path

import pytest
from ranks import server

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import detect_launcher
from distributed_mnist.distributed.job_key import job_key, secret_in
from distributed_mnist.errors import LaunchError

SECRET = "0123456789abcdef"
TWO_HOSTS = Placement(size=2, local_size=1, host="node1", launcher="environment")
ONE_HOST = Placement(size=2, local_size=2, launcher="environment")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"dmnist-{os.geteuid()}"


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_secret_from_the_environment(tmp_path: Path) -> None:
    path = private(tmp_path / "secret", f"{SECRET}\n")
    assert secret_in({"DMNIST_SECRET": f" {SECRET}\n"}) == SECRET.encode()
    assert secret_in({"DMNIST_SECRET_FILE": str(path)}) == SECRET.encode()
    assert secret_in({}) == secret_in({"DMNIST_SECRET": ""}) == b""


def test_every_launcher_takes_it() -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "2000"}
    placement = detect_launcher.detect({**variables, "DMNIST_SECRET": SECRET})
    assert placement is not None
    assert placement.secret == SECRET.encode()
    assert SECRET not in repr(placement)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(LaunchError, match="DMNIST_SECRET is shorter than 16 characters"):
        secret_in({"DMNIST_SECRET": "secret"})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = private(tmp_path / "secret", SECRET, mode)
    with pytest.raises(LaunchError, match="must belong to this user and be closed to others"):
        secret_in({"DMNIST_SECRET_FILE": str(path)})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"cannot read the secret in \S+: no such file or directory"):
        secret_in({"DMNIST_SECRET_FILE": str(tmp_path / "none")})


def test_the_key_depends_on_the_secret_and_the_job() -> None:
    keys = {
        job_key(Placement(size=2, local_size=1, host="node1", job=job, secret=secret))[0]
        for job in ("one", "two")
        for secret in (b"", SECRET.encode(), b"another secret")
    }
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


def test_without_a_secret_several_hosts_have_none() -> None:
    key, is_secret = job_key(TWO_HOSTS)
    assert not is_secret
    assert key == job_key(TWO_HOSTS)[0]


def test_on_one_host_the_users_own_file_is_the_secret(temporary: Path) -> None:
    key, is_secret = job_key(ONE_HOST)
    assert is_secret
    assert job_key(ONE_HOST)[0] == key
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert (temporary / "secret").stat().st_mode & 0o777 == 0o600
    assert len((temporary / "secret").read_text()) == 64


def test_the_home_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user can be first to create the folder for temporary files, but not the one in a home."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / f"dmnist-{os.geteuid()}").mkdir(mode=0o777)
    key, is_secret = job_key(ONE_HOST)
    assert is_secret
    path = tmp_path / "home" / ".cache" / "dmnist" / "secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert job_key(ONE_HOST)[0] == key


def test_a_home_that_cannot_be_closed_to_others(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CIFS, `chmod` has no effect."""
    home = tmp_path / "home" / ".cache" / "dmnist"
    home.mkdir(parents=True)
    home.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    key, is_secret = job_key(ONE_HOST)
    assert is_secret
    assert key == job_key(ONE_HOST)[0]
    assert (temporary / "secret").stat().st_mode & 0o777 == 0o600
    home.chmod(0o700)  # the folder can be closed, but not the file
    (home / "secret").write_text("open to all")
    (home / "secret").chmod(0o666)
    assert job_key(ONE_HOST)[0] == key


def test_no_folder_can_be_closed_to_others(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "home" / ".cache" / "dmnist", temporary):
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(LaunchError, match=rf"{temporary} must belong to this user and be closed to others"):
        job_key(ONE_HOST)


def test_a_secret_of_any_bytes(tmp_path: Path) -> None:
    path = private(tmp_path / "secret", "")
    path.write_bytes(bytes(range(128, 160)))
    assert secret_in({"DMNIST_SECRET_FILE": str(path)}) == bytes(range(128, 160))
    assert secret_in({"DMNIST_SECRET": "\udc80" * 20}) == b"\x80" * 20


def find_key(folder: str, pipe: object) -> None:
    import tempfile

    os.environ["HOME"] = "/proc/none"
    tempfile.tempdir = folder
    pipe.send(job_key(ONE_HOST)[0])  # type: ignore[attr-defined]


def test_processes_that_start_together_find_the_same(tmp_path: Path) -> None:
    context = server()
    pipes = []
    for _ in range(6):
        pipe, theirs = context.Pipe()
        context.Process(target=find_key, args=(str(tmp_path), theirs), daemon=True).start()
        pipes.append(pipe)
    assert len({pipe.recv() for pipe in pipes}) == 1


def test_a_folder_that_another_could_have_made_is_refused(temporary: Path) -> None:
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    with pytest.raises(LaunchError, match="must belong to this user"):
        job_key(ONE_HOST)


def test_a_link_to_a_folder_is_refused(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="must belong to this user"):
        job_key(ONE_HOST)


def test_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    assert job_key(ONE_HOST)[1] is False
