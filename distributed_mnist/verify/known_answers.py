"""Known answers: what the job of `dmnist verify` came to on other machines, by platform.

Bits depend on the build of torch, the device, and on a CPU on the instructions that its kernels choose. The
table says what they were where somebody has looked. The data and the order of samples are made of
integers: they are the same everywhere.
"""

import platform as python_platform
import re
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .results_table import ResultsTable

TABLE = Path(__file__).with_name("known_answers.toml")

Verdict = Literal["equal", "unknown", "differs"]


@dataclass(frozen=True)
class Platform:
    """What decides the last bits."""

    torch: str
    machine: str
    device: str
    model: str
    """The processor's or the accelerator's."""
    capability: str
    """The instructions that torch's kernels use: on a CPU as torch tells, else the device's own."""

    def __str__(self) -> str:
        parts = (self.model, self.capability, self.machine, f"torch {self.torch}")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Finding:
    """What the table says of an answer."""

    verdict: Verdict
    text: str


def this_platform(device: torch.device) -> Platform:
    """The one that runs on `device` here."""
    if device.type == "cpu":
        model, capability = _processor(), torch.backends.cpu.get_cpu_capability()
    elif device.type == "cuda":
        model = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        named = getattr(getattr(torch, device.type, None), "get_device_name", None)
        model, capability = (named(device) if named else _processor()), ""
    return Platform(
        torch=str(torch.__version__),
        machine=python_platform.machine(),
        device=device.type,
        model=" ".join(model.split()),
        capability=capability,
    )


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table: `job_sha256`, `data_sha256`, `samples_sha256`, and the rows under `answer`."""
    return tomllib.loads(path.read_text())


def look_up(result: dict[str, Any], here: Platform, table: dict[str, Any]) -> Finding:
    """What the table says of a result with these three digests."""
    for name, what in (("data_sha256", "the drawn digits"), ("samples_sha256", "the order of samples")):
        if result[name] != table[name]:
            text = f"{what} ({name} {result[name][:12]}) DIFFER from the known ones ({table[name][:12]}), "
            return Finding("differs", text + "which are the same on every platform")
    sha256 = result["weights_sha256"]
    rows = [row for row in table["answer"] if asdict(here).items() <= row.items()]
    plain = next((row for row in rows if "setting" not in row), None)
    known = _whose(sha256, table)
    if plain is None:
        text = (
            "this platform is not in the table of known answers: compare with another machine of its kind"
        )
        return Finding("unknown", text + (f" (it is the answer of {known})" if known else ""))
    if plain["weights_sha256"] == sha256:
        return Finding("equal", "equal to the known answer of this platform")
    text = f"{sha256[:12]} DIFFERS from this platform's known answer, {plain['weights_sha256'][:12]}"
    return Finding("differs", text + (f"; it is the answer of {known}" if known else ""))


def as_row(here: Platform, sha256: str) -> str:
    """A row of the table, ready to paste."""
    fields = {**asdict(here), "weights_sha256": sha256}
    return "\n".join(["[[answer]]", *(f'{name} = "{value}"' for name, value in fields.items())])


def say_known(result: dict[str, Any], here: Platform, board: ResultsTable) -> None:
    """Compare a platform's answer with the table, and say what came of it."""
    finding = look_up(result, here, read_table())
    board.fields |= {**result, "platform": asdict(here), "known_answer": asdict(finding)}
    board.say(f"\nplatform  {here}")
    colour = {"equal": "green", "unknown": "yellow", "differs": "bold red"}[finding.verdict]
    board.say(f"known     {finding.text}", colour)
    if finding.verdict == "unknown":
        board.fields["row"] = row = as_row(here, result["weights_sha256"])
        board.say(f"\na row for distributed_mnist/{TABLE.name}:\n\n{row}")
    if finding.verdict == "differs":
        board.wrong.append(finding.text)


def _whose(sha256: str, table: dict[str, Any]) -> str | None:
    """Which row has this answer, in words."""
    row = next((row for row in table["answer"] if row["weights_sha256"] == sha256), None)
    if row is None:
        return None
    setting = f" with {row['setting']}" if "setting" in row else ""
    return f"{row['model']}, {row['capability']}, torch {row['torch']}{setting}"


def _processor() -> str:
    """The CPU's name, with family and model where the name alone says little (in virtual machines)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return python_platform.processor() or "unknown processor"
    found = dict(re.findall(r"^([^\t:]+)\s*: *(.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = found.get("model name") or found.get("CPU implementer", "unknown processor")
    numbers = [
        f"{word} {found[key]}"
        for word, key in (("family", "cpu family"), ("model", "model"), ("part", "CPU part"))
        if key in found
    ]
    return " ".join([name.replace('"', ""), *numbers])
