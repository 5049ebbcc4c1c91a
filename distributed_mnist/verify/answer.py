"""The one answer: digests of the weights after each step, and of what every step computes."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.digest import digest
from .job import DATA, ExactJob, recipe
from .traced_pass import Trace

ANSWER_FILE = Path(__file__).with_name("answer.toml")


@dataclass(frozen=True)
class KnownAnswer:
    """What the job computes on every machine. Lists are by step."""

    job_sha256: str
    data_sha256: str
    weights_sha256: list[str]
    """Of the weights after 0, 1, 2, ... steps: one more than there are steps."""
    weights: list[Trace]
    """Of each parameter after 0, 1, 2, ... steps."""
    steps: list[Trace]
    """What each step computes of its whole batch: of each layer, and the sums over the batch."""


def job_sha256() -> str:
    """Return the digest of the job's settings."""
    return digest([recipe().to_dict(), DATA])


def read_answer() -> KnownAnswer:
    """Read the answer."""
    table = tomllib.loads(ANSWER_FILE.read_text())

    def traces(name: str) -> list[Trace]:
        return [dict(zip(table[name]["names"], row.split(), strict=True)) for row in table[name]["digests"]]

    return KnownAnswer(
        job_sha256=table["job_sha256"],
        data_sha256=table["data_sha256"],
        weights_sha256=table["weights_sha256"],
        weights=traces("weights"),
        steps=traces("steps"),
    )


def measure_answer() -> KnownAnswer:
    """Run the job on the CPU of this machine, and return what it computes."""
    job = ExactJob(torch.device("cpu"))
    sha256, weights, steps = [job.weights_sha256()], [job.weights_trace()], []
    for step in range(job.steps):
        job.add_part(step, 0, 1)
        steps.append(job.trace())
        job.finish(step)
        sha256.append(job.weights_sha256())
        weights.append(job.weights_trace())
    return KnownAnswer(job_sha256(), job.data_sha256, sha256, weights, steps)


def to_toml(answer: KnownAnswer) -> str:
    """Return the text of the file."""

    def rows(name: str, values: list[str]) -> str:
        return f"{name} = [\n" + "".join(f'  "{value}",\n' for value in values) + "]\n"

    def traces(name: str, values: list[Trace]) -> str:
        digests = [" ".join(value.values()) for value in values]
        return f"\n[{name}]\n{rows('names', list(values[0]))}{rows('digests', digests)}"

    return (
        "# What the job of `dmnist verify` computes on every machine. docs/reference/make_exact_answer.py\n"
        "# wrote this file.\n"
        f'job_sha256 = "{answer.job_sha256}"\n'
        f'data_sha256 = "{answer.data_sha256}"\n\n'
        "# Of all weights after 0, 1, ... steps. The last one is the known answer.\n"
        + rows("weights_sha256", answer.weights_sha256)
        + "\n# Short digests of each parameter after 0, 1, ... steps, and of what each step computes."
        + traces("weights", answer.weights)
        + traces("steps", answer.steps)
    )
