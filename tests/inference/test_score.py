"""`dmnist evaluate`: what it says before it begins."""

from pathlib import Path

import pytest
from ranks import train
from warm import here


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_emulated_bf16_is_told(precision: str, digits: Path, tmp_path: Path) -> None:
    flags = ("--dataset", "idx", "--data", digits)
    train(
        *flags, "--recipe", "classic", "--precision", precision, "--steps", 1, nproc=1, out=tmp_path / "run"
    )
    ended = here("evaluate", tmp_path / "run", "--device", "cpu", ONEDNN_MAX_CPU_ISA="AVX2")
    note = "note: this network was trained in bf16, which this hardware emulates: scoring is slow here\n"
    assert ended.code == 0
    assert ended.stdout.startswith(note) is (precision == "bf16")
