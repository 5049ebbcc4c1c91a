"""The files under deploy/ match the schemas of their readers. The pods of job.yaml, run as processes on
this machine, end with the same weights as a run without faults."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paced import Job, assert_same
from ranks import DMNIST, REPOSITORY, TORCHRUN, Program, WarmProgram, free_port
from torchrun_agents import WarmAgent

from distributed_mnist.cli.parser import parse

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the extra `dev` is not installed")
yaml = pytest.importorskip("yaml")

DEPLOY = REPOSITORY / "deploy"
JOB, TRAINJOB = DEPLOY / "kubernetes" / "job.yaml", DEPLOY / "kubernetes" / "trainjob.yaml"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
RELEASE = "1.31"
"""Of Kubernetes: the first in which all that job.yaml uses is there for good."""


def documents(path: Path, *, gpus: bool = False) -> dict[str, Any]:
    """The objects in a file by kind; with `gpus`, after the `sed` that docs/how-to/clusters.md shows."""
    text = path.read_text()
    if gpus:
        assert "#GPU " in text
        text = text.replace("#GPU ", "")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container(job: dict[str, Any]) -> dict[str, Any]:
    (one,) = job["spec"]["template"]["spec"]["containers"]
    return one


# ---- Schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("path", [JOB, TRAINJOB], ids=lambda path: path.name)
def test_kubernetes_objects_fit_their_schema(path: Path, gpus: bool) -> None:
    checked = []
    for kind, document in documents(path, gpus=gpus).items():
        if not document["apiVersion"].startswith("trainer."):
            kubernetes_validate.validate(document, RELEASE, strict=True)
            checked.append(kind)
    assert checked


@pytest.mark.parametrize("gpus", [False, True])
def test_kubeflow_objects_fit_their_schema(gpus: bool) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    found = documents(TRAINJOB, gpus=gpus)
    for kind in ("TrainingRuntime", "TrainJob"):
        model = getattr(models, f"TrainerV1alpha1{kind}")
        # What the schema does not know is dropped on the way.
        assert model.from_dict(found[kind]).to_dict() == found[kind]
    misspelt = {**found["TrainJob"], "spec": {**found["TrainJob"]["spec"], "trainner": {}}}
    assert models.TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict() != misspelt


def test_a_misspelt_field_of_a_job_is_noticed() -> None:
    job = documents(JOB)["Job"]
    job["spec"]["paralellism"] = 4
    with pytest.raises(kubernetes_validate.ValidationError, match="paralellism"):
        kubernetes_validate.validate(job, RELEASE, strict=True)


# ---- What one part says of another -----------------------------------------------------------------------


def test_the_job_agrees_with_itself() -> None:
    found = documents(JOB)
    job, service, claim = found["Job"], found["Service"], found["PersistentVolumeClaim"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    variables = {one["name"]: one for one in container(job)["env"]}
    name = job["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == int(variables["WORLD_SIZE"]["value"])
    assert variables["MASTER_ADDR"]["value"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert all(rule["onExitCodes"]["containerName"] == container(job)["name"] for rule in rules.values())
    codes = {action: set(rule["onExitCodes"]["values"]) for action, rule in rules.items()}
    assert codes["Ignore"] == {75}
    assert not codes["FailJob"] & {0, 5, 6, 8, 75, 130, 137, 143}, "these another attempt may mend"
    # The program's own limit on a stop, and something for the kubelet.
    assert pod["terminationGracePeriodSeconds"] > 20


def test_the_trainjob_agrees_with_itself() -> None:
    found = documents(TRAINJOB)
    runtime, job, claim = found["TrainingRuntime"], found["TrainJob"], found["PersistentVolumeClaim"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert replicated["name"] == pod["containers"][0]["name"] == "node", "the names that Kubeflow looks for"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > 30


def options_of(path: Path) -> list[str]:
    found = documents(path)
    return container(found["Job"])["args"] if path == JOB else found["TrainJob"]["spec"]["trainer"]["args"]


@pytest.mark.parametrize("path", [JOB, TRAINJOB], ids=lambda path: path.name)
def test_what_pods_run_is_a_command_that_goes_on(path: Path) -> None:
    parse(["train", *options_of(path)])
    words = options_of(path)
    assert words[words.index("--resume") + 1] == "auto"
    for folder in ("--out", "--data"):
        assert words[words.index(folder) + 1].startswith("/runs/"), "on the volume"


# ---- Pods as processes -----------------------------------------------------------------------------------


@pytest.fixture
def job(digits: Path, tmp_path: Path) -> Job:
    (tmp_path / "data").symlink_to(digits)
    return Job(tmp_path, tmp_path / "first")


class Pods:
    """Two pods of job.yaml: what they run, and what the Job's controller would do."""

    def __init__(self, job: Job) -> None:
        self._job, self._spec = job, documents(JOB)["Job"]["spec"]
        self._port = str(free_port())
        self.running = [self._start(index) for index in range(2)]

    def _start(self, index: int) -> Program:
        here = container({"spec": self._spec})
        values = {
            one["name"]: one.get("value") or self._field(one["valueFrom"], index) for one in here["env"]
        }
        changed = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port}
        assert values.keys() == {"RANK", "DMNIST_SECRET", *changed}
        volume = str(self._job.out.parent)
        words = [re.sub(r"^/runs", volume, word) for word in (*here["command"], *here["args"])]
        assert words[0] == "dmnist"
        job = self._job.words[1:]  # later flags win: the test's small job in place of MNIST
        return WarmProgram(
            (*DMNIST, *words[1:], *job),
            cwd=self._job.out.parent,
            **self._job.variables,
            **{**values, **changed},
        )

    def end(self) -> None:
        """End both, if they have not ended yet."""
        for pod in self.running:
            pod.__exit__()

    @staticmethod
    def _field(source: dict[str, Any], index: int) -> str:
        if secret := source.get("secretKeyRef"):
            assert secret == {"name": "dmnist", "key": "secret", "optional": True}
            return ""  # as where nobody made it
        assert source == {"fieldRef": {"fieldPath": INDEX}}
        return str(index)

    def action(self, code: int) -> str:
        """What the policy has the controller do after a container ended like that."""
        for rule in self._spec["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                return rule["action"]
        return "Count"

    def replace(self) -> list[str]:
        """Wait for both to end, and start both anew, as the controller would; the actions taken."""
        codes = [pod.finish().code for pod in self.running]
        self.end()
        actions = [self.action(code % 256 if code >= 0 else 128 - code) for code in codes]
        assert 0 not in codes and "FailJob" not in actions, (codes, actions)
        self.running = [self._start(index) for index in range(2)]
        return actions


@pytest.fixture
def pods(job: Job) -> Iterator[Pods]:
    pods = Pods(job)
    yield pods
    pods.end()


@pytest.mark.slow
def test_pods_that_are_killed_and_stopped(pods: Pods, job: Job, expected: dict[str, Any]) -> None:
    """Each rank's pod is killed once, and one pod is drained: the weights equal those without faults."""
    counted = 0
    for victim, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        job.under_way(pods.running[0], size=2)
        pods.running[victim].signal(number)
        actions = pods.replace()
        counted += actions.count("Count")
        assert actions == (["Ignore"] * 2 if number == signal.SIGTERM else ["Count"] * 2)
    job.under_way(pods.running[0], size=2)
    job.hurry()
    ends = [pod.finish() for pod in pods.running]
    assert [end.code for end in ends] == [0, 0], ends
    assert_same(json.loads((job.out / "result.json").read_text()), expected, world_size=2)
    assert counted == 4
    starts = [start["step"] for start in job.starts()]
    assert starts == sorted(starts) and starts[-1] > 0


@pytest.mark.slow
def test_nodes_of_the_trainjob(job: Job, expected: dict[str, Any]) -> None:
    """torchrun as Kubeflow starts it, which tells it of the others in PET_ variables. A node is lost, and
    the whole set is started again, as `failurePolicy` says."""
    trainer = documents(TRAINJOB)["TrainJob"]["spec"]["trainer"]
    assert trainer["command"][0] == "torchrun"
    volume = str(job.out.parent)
    words = [re.sub(r"^/runs", volume, word) for word in (*trainer["command"][1:], *trainer["args"])]
    port = str(free_port())

    def start(rank: int) -> WarmAgent:
        place = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        return WarmAgent((*TORCHRUN, *words, *job.words[1:]), cwd=job.out.parent, **job.variables, **place)

    nodes = [start(rank) for rank in range(trainer["numNodes"])]
    try:
        job.under_way(nodes[0], size=2)
        saved = job.out / "checkpoints"
        nodes[0].wait_for(lambda: any(saved.glob("step_*.pt")), "a checkpoint")
        for node in reversed(nodes):  # the first is lost, and JobSet deletes the others
            node.signal(signal.SIGKILL, group=True)
            node.gone()
            node.__exit__()
        nodes = [start(rank) for rank in range(trainer["numNodes"])]
        job.under_way(nodes[0], size=2)
        job.hurry()
        ends = [node.finish() for node in nodes]
    finally:
        for node in nodes:
            node.__exit__()
    assert [end.code for end in ends] == [0, 0], ends
    assert_same(json.loads((job.out / "result.json").read_text()), expected, world_size=2)
    assert job.starts()[-1]["step"] > 0
