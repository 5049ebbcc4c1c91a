"""The current folder, and signals, before anything else."""

import signal
from pathlib import Path

import pytest

from distributed_mnist.cli import main
from distributed_mnist.launcher.signals import SIGNALS


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


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "dmnist: stopped by SIGTERM before there was anything to save\n"),
        (signal.SIGINT, 130, "dmnist: stopped at once\n"),
        (signal.SIGHUP, 0, ""),  # ignored, as under nohup
    ],
)
def test_a_signal_before_a_command_handles_it_itself(
    number: int, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(main._COMMANDS, "Report", lambda _: signal.raise_signal(number) or 0)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises(SystemExit) as end:
            main.main(["report", "somewhere"])
        assert [signal.getsignal(each) for each in SIGNALS] == before
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert end.value.code == code
    assert capsys.readouterr().err == said
