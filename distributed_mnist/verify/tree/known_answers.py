"""Look up the known answer of the job of `dmnist verify --sync tree` on a platform.

The bits depend on the build of torch, on the device and, on a CPU, on the instructions that torch's kernels
choose. The table contains measured answers. The data and the order of samples are computed with integers,
so they are the same on every platform.
"""

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...common import compute_platform
from ..results_table import ResultsTable

TABLE_FILE = Path(__file__).with_name("known_answers.toml")

Verdict = Literal["equal", "unknown", "differs"]


@dataclass(frozen=True)
class Platform:
    """The properties of a platform that decide the last bits."""

    torch: str
    machine: str
    device: str
    model: str
    """The name of the processor or the accelerator."""
    capability: str
    """The instructions that torch's kernels use: on a CPU as torch reports them, else the device's own."""

    def __str__(self) -> str:
        parts = (self.model, self.capability, self.machine, f"torch {self.torch}")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Finding:
    """The result of looking up an answer in the table."""

    verdict: Verdict
    text: str


def this_platform(device: torch.device) -> Platform:
    """Describe the platform of `device` on this host."""
    here = compute_platform.this_platform(device)
    return Platform(here.torch, here.machine, here.device, here.processor, here.capability)


def read_table(path: Path = TABLE_FILE) -> dict[str, Any]:
    """Read the table: `job_sha256`, `data_sha256`, `samples_sha256`, and the rows under `answer`."""
    return tomllib.loads(path.read_text())


def look_up(result: dict[str, Any], platform: Platform, table: dict[str, Any]) -> Finding:
    """Compare a result, which has these three digests, with the table."""
    for name, what in (("data_sha256", "the generated digits"), ("samples_sha256", "the order of samples")):
        if result[name] != table[name]:
            text = f"{what} ({name} {result[name][:12]}) DIFFER from the known ones ({table[name][:12]}), "
            return Finding("differs", text + "which are the same on every platform")
    sha256 = result["weights_sha256"]
    rows = [row for row in table["answer"] if asdict(platform).items() <= row.items()]
    expected = next((row for row in rows if "setting" not in row), None)
    source = _source_of(sha256, table)
    if expected is None:
        text = (
            "this platform is not in the table of known answers: compare with another machine of its kind"
        )
        return Finding("unknown", text + (f" (it is the answer of {source})" if source else ""))
    if expected["weights_sha256"] == sha256:
        return Finding("equal", "equal to the known answer of this platform")
    text = f"{sha256[:12]} DIFFERS from this platform's known answer, {expected['weights_sha256'][:12]}"
    return Finding("differs", text + (f"; it is the answer of {source}" if source else ""))


def toml_row(platform: Platform, sha256: str) -> str:
    """Format a row of the table, ready to paste."""
    fields = {**asdict(platform), "weights_sha256": sha256}
    return "\n".join(["[[answer]]", *(f'{name} = "{value}"' for name, value in fields.items())])


def report_known_answer(result: dict[str, Any], platform: Platform, table: ResultsTable) -> None:
    """Compare a platform's answer with the known one and show the outcome."""
    finding = look_up(result, platform, read_table())
    table.json_fields |= {**result, "platform": asdict(platform), "known_answer": asdict(finding)}
    table.print_line(f"\nplatform  {platform}")
    color = {"equal": "green", "unknown": "yellow", "differs": "bold red"}[finding.verdict]
    table.print_line(f"known     {finding.text}", color)
    if finding.verdict == "unknown":
        table.json_fields["row"] = row = toml_row(platform, result["weights_sha256"])
        table.print_line(f"\na row for distributed_mnist/verify/tree/{TABLE_FILE.name}:\n\n{row}")
    if finding.verdict == "differs":
        table.problems.append(finding.text)


def _source_of(sha256: str, table: dict[str, Any]) -> str | None:
    """Describe the platform and setting that gave this answer; None if no row has it."""
    row = next((row for row in table["answer"] if row["weights_sha256"] == sha256), None)
    if row is None:
        return None
    setting = f" with {row['setting']}" if "setting" in row else ""
    return f"{row['model']}, {row['capability']}, torch {row['torch']}{setting}"
