"""The current folder, before anything else."""

from pathlib import Path

import pytest

from distributed_mnist.cli import main


def test_a_deleted_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SystemExit) as end:
        main.main(["data", "check"])
    assert end.value.code == 2
    message = (
        "dmnist: the current folder cannot be used (no such file or directory): cd to one that exists\n"
    )
    assert capsys.readouterr().err == message
