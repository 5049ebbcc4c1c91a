"""The one answer: the weights' digest at the end, and digests of what every step computes."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from ...common.digest import digest
from .job import DATA, ExactJob, recipe
from .traced_pass import Trace

ANSWER_FILE = Path(__file__).with_name("answer.toml")
_DIGITS = 16


@dataclass(frozen=True)
class KnownAnswer:
    """What the job computes on every machine. Lists are by step, each value by name."""

    job_sha256: str
    data_sha256: str
    weights_sha256: str
    steps: list[str]
    """The first 16 digits of the weights' digest after each step."""
    sums: list[Trace]
    """Of the sums over the batch in each step."""
    weights: list[Trace]
    """Of each parameter after 0, 1, 2, ... steps: one more than there are steps."""


def job_sha256() -> str:
    """Return the digest of the job's settings."""
    return digest([recipe().to_dict(), DATA])


def read_answer() -> KnownAnswer:
    """Read the answer."""
    table = tomllib.loads(ANSWER_FILE.read_text())

    def traces(names: str, rows: str) -> list[Trace]:
        return [dict(zip(table[names], row.split(), strict=True)) for row in table[rows]]

    return KnownAnswer(
        job_sha256=table["job_sha256"],
        data_sha256=table["data_sha256"],
        weights_sha256=table["weights_sha256"],
        steps=table["steps"],
        sums=traces("sum_names", "sums"),
        weights=traces("weight_names", "weights"),
    )


def measure_answer() -> KnownAnswer:
    """Run the job on the CPU of this machine, and return what it computes."""
    job = ExactJob(torch.device("cpu"))
    steps, sums, weights = [], [], [job.weights_trace()]
    for step in range(job.steps):
        job.add_part(step, 0, 1)
        sums.append(job.pass_.sums_trace())
        job.finish(step)
        weights.append(job.weights_trace())
        steps.append(job.weights_sha256()[:_DIGITS])
    return KnownAnswer(job_sha256(), job.data_sha256, job.weights_sha256(), steps, sums, weights)


def to_toml(answer: KnownAnswer) -> str:
    """Return the text of the file."""

    def rows(name: str, values: list[str]) -> str:
        return f"{name} = [\n" + "".join(f'  "{value}",\n' for value in values) + "]\n"

    return (
        "# What the job of `dmnist verify` computes on every machine. docs/reference/make_exact_answer.py\n"
        "# wrote this file.\n"
        f'job_sha256 = "{answer.job_sha256}"\n'
        f'data_sha256 = "{answer.data_sha256}"\n'
        f'weights_sha256 = "{answer.weights_sha256}"\n\n'
        "# The first digits of the weights' digest after each step.\n"
        + rows("steps", answer.steps)
        + "\n# Short digests of the sums of each step, and of the weights after 0, 1, ... steps.\n"
        + rows("sum_names", list(answer.sums[0]))
        + rows("sums", [" ".join(row.values()) for row in answer.sums])
        + rows("weight_names", list(answer.weights[0]))
        + rows("weights", [" ".join(row.values()) for row in answer.weights])
    )
