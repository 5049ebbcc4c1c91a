"""Launcher detection as a pure function of the environment, and ports derived from a job's name."""

import os
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ranks import DMNIST, WarmProgram, dmnist_ranks, free_port

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import detect_launcher
from distributed_mnist.errors import LaunchError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "127.0.0.[1-3]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_NNODES": "3",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-1234@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def placed(env: Mapping[str, str], **changes: str | None) -> Placement:
    changed = {**env, **{name: value for name, value in changes.items() if value is not None}}
    for name, value in changes.items():
        if value is None:
            del changed[name]
    placement = detect_launcher.detect(changed)
    assert placement is not None
    return placement


def refusal(env: Mapping[str, str], **changes: str | None) -> str:
    with pytest.raises(LaunchError) as caught:
        placed(env, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("env", [{}, {"PATH": "/bin", "HOME": "/root"}, BATCH_SCRIPT])
def test_alone(env: dict[str, str]) -> None:
    """A batch script that srun did not start is one process, however large its job is."""
    assert detect_launcher.detect(env) is None


def test_one_slurm_task_is_a_single_process() -> None:
    """`srun dmnist train` then uses its node's devices as `dmnist train` does."""
    assert detect_launcher.detect({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPENMPI.items() if "OMPI" in name}


@pytest.mark.parametrize(
    ("env", "command"),
    [
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "torchrun -m distributed_mnist"),
        ({"PET_NNODES": "1:4"}, "torchrun -m distributed_mnist"),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}, "--node-rank $SKYPILOT_NODE_RANK"),
        ({"LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "1"}, "--node-rank $LWS_WORKER_INDEX"),
        ({"SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-1"}, "torch_distributed"),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, "mpirun or torchrun"),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}, "mpirun or torchrun"),
    ],
)
def test_several_processes_of_a_launcher_that_is_not_supported(env: dict[str, str], command: str) -> None:
    """Each would train alone, with the whole data, and write its own run."""
    message = refusal(env)
    (name, value), *_ = ((name, env[name]) for name in detect_launcher._UNKNOWN if name in env)
    assert message.startswith(f"{name} is {value}, but the variables do not say which process this is")
    assert command in message
    assert f"unset {name}" in message
    one = {name: '["algo-1"]' if name == "SM_HOSTS" else "1"}
    assert detect_launcher.detect({**env, **one}) is None


def test_an_address_without_a_rank() -> None:
    message = refusal({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert message.startswith("MASTER_ADDR is set, but RANK is not")
    assert "unset MASTER_ADDR" in message
    for alone in ("localhost", "127.0.0.1", "[::1]", " "):  # notebooks set it for torch's own examples
        assert detect_launcher.detect({"MASTER_ADDR": alone}) is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (BATCH_SCRIPT, "this job has 3 nodes, and this command uses one of them: srun dmnist ... uses all"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "this job has 2 nodes, and "),
        ({"PBS_NUM_NODES": "4"}, "this job has 4 nodes, and this command uses one of them: mpirun "),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}, None),
        ({"SLURM_JOB_NUM_NODES": "many"}, None),
        ({**SRUN, "SLURM_NNODES": "3", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, None),
    ],
)
def test_nodes_that_a_command_does_not_use(env: dict[str, str], said: str | None) -> None:
    """A batch script or a shell of salloc may mean to use one node. So this is a note."""
    note = detect_launcher.unused_nodes(env)
    assert note is None if said is None else (note or "").startswith(said)


def test_mvapich() -> None:
    assert placed(MVAPICH) == placed({**OPENMPI, "PMIX_NAMESPACE": f"{os.getppid()}"})
    assert refusal(MVAPICH, MV2_COMM_WORLD_SIZE=None).startswith("MV2_COMM_WORLD_SIZE is not set")


@pytest.mark.parametrize("env", [OPENMPI, MPICH, MVAPICH])
def test_mpirun_whose_helpers_srun_started(env: dict[str, str]) -> None:
    """Each rank has the variables of the helper on its node: srun's rank is the node's number."""
    helper = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "2"}
    assert placed({**SRUN, **helper, **env}) == placed(env)
    pmi2 = {"PMI_RANK": "3", "PMI_SIZE": "5"}  # srun --mpi=pmi2
    assert placed({**SRUN, **pmi2}) == placed(SRUN)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node1 ", "node1"),
        ("10.0.0.1 \n", "10.0.0.1"),
        ("[fd00::1]", "fd00::1"),
        ("fd00::1", "fd00::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("[fd00::1]:23456", "fd00::1"),
        ("tcp://node1", "node1"),
        ("tcp://node1:23456/", "node1"),
        ("http://10.0.0.1/", "10.0.0.1"),
        ("node1:23456", "node1"),
        ("dmnist-0.dmnist.default.svc.cluster.local.", "dmnist-0.dmnist.default.svc.cluster.local."),
        ("job_1-master-0", "job_1-master-0"),
        ("0.0.0.0", "0.0.0.0"),
        ("bücher.example", "bücher.example"),
    ],
)
def test_addresses_are_cleaned(text: str, host: str) -> None:
    """`hostname -I` leaves a space at the end; others copy a URL."""
    assert placed(KUBEFLOW, MASTER_ADDR=text).host == host
    assert placed(SRUN, MASTER_ADDR=text, MASTER_PORT="23456").host == host
    over_hosts = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert placed(OPENMPI, **over_hosts, MASTER_ADDR=text, MASTER_PORT="23456").host == host


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.1 172.17.0.1", "choose one of these addresses"),
        ("10.0.0.1,10.0.0.2", "choose one of these addresses"),
        ("node1:29500", "but MASTER_PORT is 23456"),
        ("[fd00::1]:1", "but MASTER_PORT is 23456"),
        ("http://node1/path", "not the name or address of a host"),
        ("node1:port", "not the name or address of a host"),
        ("$(hostname)", "not the name or address of a host"),
        ("a..b", "not the name or address of a host"),
        ("x" * 70, "not the name or address of a host"),
        ("10.0.0", "not the name or address of a host"),
        ("10.0.0.256", "not the name or address of a host"),
        ("[fd00::1", "not the name or address of a host"),
        ("224.0.0.1", "not the name or address of a host"),
        ("255.255.255.255", "not the name or address of a host"),
    ],
)
def test_impossible_addresses(text: str, why: str) -> None:
    """Waiting for five minutes would not help."""
    message = refusal(KUBEFLOW, MASTER_ADDR=text)
    assert message.startswith("MASTER_ADDR is ")
    assert why in message


def test_only_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect_launcher.detect({}) is None


def test_torchrun() -> None:
    placement = placed(TORCHRUN)
    assert (placement.rank, placement.size) == (3, 6)
    assert (placement.local_rank, placement.local_size) == (1, 2)
    assert (placement.host, placement.ports) == ("node1", (29400,))
    assert placement.store_exists
    assert placement.launcher == "torchrun"


def test_a_restarted_group_keeps_its_launcher_id() -> None:
    first, second = placed(TORCHRUN, TORCHELASTIC_RESTART_COUNT="0"), placed(TORCHRUN)
    assert first.job == second.job
    assert first.launcher_id == second.launcher_id != ""
    assert placed(SRUN).launcher_id == placed(SRUN, SLURM_RESTART_COUNT="2").launcher_id
    assert placed(SRUN).launcher_id != placed(SRUN, SLURM_JOB_ID="78").launcher_id
    assert placed(OPENMPI).launcher_id == ""  # mpirun does not restart processes


def test_environment_variables_of_any_launcher() -> None:
    """Kubeflow sets four variables and no local rank: one process per host."""
    placement = placed(KUBEFLOW)
    assert (placement.rank, placement.size, placement.local_rank, placement.local_size) == (1, 2, 0, 1)
    assert (placement.host, placement.ports) == ("job-master-0", (23456,))
    assert not placement.store_exists
    assert placement.launcher == "environment"


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert placed({**SRUN, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("env", [TORCHRUN, KUBEFLOW])
def test_missing_variables_of_torchrun(env: dict[str, str], name: str) -> None:
    message = refusal(env, **{name: None})
    assert message.startswith(f"{name} is not set")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_one_variable_alone(name: str) -> None:
    """It was exported before, or a launcher is broken. Training with one process would be wrong."""
    message = refusal({name: "1"})
    assert "is not set" in message
    assert re.search(rf"\b{name}\b", message)


def test_a_local_size_without_a_local_rank() -> None:
    assert refusal(TORCHRUN, LOCAL_RANK=None).startswith("LOCAL_RANK is not set")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "two"}, ["RANK", "'two'"]),
        ({"RANK": ""}, ["RANK", "''"]),
        ({"RANK": "1.5"}, ["RANK", "'1.5'"]),
        ({"RANK": "6"}, ["RANK is 6", "WORLD_SIZE 6"]),
        ({"RANK": "-1"}, ["RANK is -1"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE 0"]),
        ({"WORLD_SIZE": "-2"}, ["WORLD_SIZE -2"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT", "'http'"]),
        ({"LOCAL_RANK": "2"}, ["local rank 2 of 2"]),
        ({"LOCAL_RANK": "-1"}, ["local rank -1"]),
    ],
)
def test_impossible_numbers(changes: dict[str, str], words: list[str]) -> None:
    message = refusal(TORCHRUN, **changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "changes", [{"MASTER_PORT": "0"}, {"MASTER_PORT": "-5"}, {"MASTER_PORT": "70000"}, {"MASTER_ADDR": ""}]
)
def test_an_impossible_rendezvous_address(changes: dict[str, str]) -> None:
    """Reported at once, with the variable's name, and not minutes later as a timeout."""
    (name,) = changes
    assert name in refusal(KUBEFLOW, **changes)


def test_srun() -> None:
    placement = placed(SRUN)
    assert (placement.rank, placement.size) == (3, 5)
    assert (placement.local_rank, placement.local_size) == (1, 2)
    assert placement.host == "127.0.0.1"
    assert placement.launcher == "srun"
    assert not placement.own_device


def test_srun_with_a_device_for_each_task() -> None:
    assert placed(SRUN, SLURM_GPUS_PER_TASK="1").own_device


def test_all_ranks_of_srun_derive_the_same_address() -> None:
    placements = [
        placed(SRUN, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank // 2), SLURM_LOCALID=str(rank % 2))
        for rank in range(5)
    ]
    assert {(placement.host, placement.ports, placement.job) for placement in placements} == {
        (placements[0].host, placements[0].ports, placements[0].job)
    }
    assert [placement.local_size for placement in placements] == [2, 2, 2, 2, 1]
    assert len(set(placements[0].ports)) > 1
    assert all(1024 < port < 32_768 for port in placements[0].ports)


def test_jobs_and_their_restarts_use_different_ports() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"SLURM_JOB_ID": "78"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ]
    placements = [placed(SRUN, **change) for change in changes]
    assert len({placement.ports for placement in placements}) == 4
    assert len({placement.job for placement in placements}) == 4


def test_one_port_on_request() -> None:
    placement = placed(SRUN, MASTER_PORT="12345", MASTER_ADDR="10.0.0.1")
    assert (placement.host, placement.ports) == ("10.0.0.1", (12345,))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5]", "node3"),
        ("node[07-09,12]", "node07"),
        ("node[12,07-09],other", "node12"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("a-b[5]-c,d", "a-b5-c"),
        ("gpu-a100-[001-128].example.org", "gpu-a100-001.example.org"),
    ],
)
def test_hostlists(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # every name resolves
    assert placed(SRUN, SLURM_STEP_NODELIST=nodes).host == first


def test_the_jobs_nodes_if_the_step_has_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert placed(SRUN, SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST="n[8-9]").host == "n8"
    assert refusal(SRUN, SLURM_STEP_NODELIST=None).startswith("SLURM_JOB_NODELIST is not set")


def test_a_node_whose_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert placed(SRUN, SLURM_LAUNCH_NODE_IPADDR="10.1.2.3").host == "10.1.2.3"


def test_one_node_needs_no_names() -> None:
    changes = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    placement = placed(SRUN, **changes, SLURM_STEP_NODELIST="nowhere.invalid")
    assert (placement.host, placement.local_size) == ("127.0.0.1", 5)


@pytest.mark.parametrize(("node", "tasks"), [(0, 4), (1, 4), (2, 4), (3, 2), (4, 2), (5, 1)])
def test_tasks_per_node(node: int, tasks: int) -> None:
    placement = placed(
        SRUN,
        SLURM_STEP_NUM_TASKS="17",
        SLURM_STEP_TASKS_PER_NODE="4(x3),2(x2),1",
        SLURM_NODEID=str(node),
        SLURM_LOCALID="0",
    )
    assert placement.local_size == tasks


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_STEP_NUM_NODES",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_LOCALID",
    ],
)
def test_missing_variables_of_srun(name: str) -> None:
    assert refusal(SRUN, **{name: None}).startswith(f"{name} is not set")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_PROCID": "5"}, ["SLURM_PROCID is 5", "SLURM_STEP_NUM_TASKS 5"]),
        ({"SLURM_PROCID": "x"}, ["SLURM_PROCID", "'x'"]),
        ({"SLURM_STEP_NUM_TASKS": "many"}, ["SLURM_STEP_NUM_TASKS", "'many'"]),
        ({"SLURM_NODEID": "3"}, ["SLURM_NODEID is 3", "SLURM_STEP_TASKS_PER_NODE has 3"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE", "'two'"]),
        ({"SLURM_LOCALID": "2"}, ["local rank 2 of 2"]),
    ],
)
def test_impossible_numbers_of_srun(changes: dict[str, str], words: list[str]) -> None:
    message = refusal(SRUN, **changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize("env", [OPENMPI, MPICH])
def test_mpi_on_one_host(env: dict[str, str]) -> None:
    placement = placed(env)
    assert (placement.rank, placement.size, placement.local_rank, placement.local_size) == (1, 2, 1, 2)
    assert placement.host == "127.0.0.1"
    assert placement.launcher == "mpirun"
    rank_zero = {name: "0" if value == "1" else value for name, value in env.items()}
    assert placed(rank_zero).ports == placement.ports
    assert placed(rank_zero).job == placement.job


def test_mpi_over_hosts() -> None:
    changes = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert refusal(OPENMPI, **changes).startswith("MASTER_ADDR is not set")
    placement = placed(OPENMPI, **changes, MASTER_ADDR="node1")
    assert placement.host == "node1"
    assert len(placement.ports) > 1


def test_mpi_over_hosts_needs_a_name_or_a_port() -> None:
    changes = {"PMI_SIZE": "4", "MASTER_ADDR": "node1"}
    assert refusal(MPICH, **changes).startswith("MASTER_PORT is not set")
    assert placed(MPICH, **changes, MASTER_PORT="12345").ports == (12345,)
    assert len(placed(MPICH, **changes, PMI_JOBID="kvs_1").ports) > 1


@pytest.mark.parametrize("env", [OPENMPI, MPICH])
def test_missing_variables_of_mpi(env: dict[str, str]) -> None:
    for name in env:
        if name not in ("PMIX_NAMESPACE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            assert refusal(env, **{name: None}).startswith(f"{name} is not set")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpi_without_a_size(name: str) -> None:
    """A rank that does not know the world size must not train alone."""
    env = OPENMPI if name in OPENMPI else MPICH
    assert name in refusal(env, **{name: None})


def test_impossible_numbers_of_mpi() -> None:
    assert "OMPI_COMM_WORLD_RANK is 2" in refusal(OPENMPI, OMPI_COMM_WORLD_RANK="2")
    assert "'one'" in refusal(MPICH, PMI_RANK="one")
    assert "local rank 2" in refusal(MPICH, MPI_LOCALRANKID="2")


# ---- Ports -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_busy_port_is_skipped(digits: Path, tmp_path: Path) -> None:
    """Another program listens on the job's first port and never answers. The group uses the next port."""
    job: dict[str, str] = {"PMIX_NAMESPACE": f"busy-{os.getpid()}"}
    ranks = [{**OPENMPI, **job, "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_LOCAL_RANK": r} for r in "01"]
    first = placed(ranks[0]).ports[0]
    with socket.create_server(("127.0.0.1", first)):
        flags: list[Any] = ["--recipe", "classic", "--epochs", 1, "--dataset", "idx", "--data", digits]
        words = ["train", "--device", "cpu", *flags, "--out", tmp_path / "out", "--json"]
        ends = dmnist_ranks(ranks, *words)
    assert [end.code for end in ends] == [0, 0], ends
    assert ends[0].json()["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_waiting_for_the_others(number: int, digits: Path, tmp_path: Path) -> None:
    """Hosts can start minutes apart. A rank that waits for another host still obeys signals."""
    port = free_port()
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["train", "--device", "cpu", "--dataset", "idx", "--data", digits, "--out", tmp_path / "out"]

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with WarmProgram([*DMNIST, *words], cwd=None, **variables) as program:
        program.wait_for(listening, "the store")
        program.signal(number)
        ended = program.finish()
    assert ended.code == 75, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dmnist: stopped by ")
    assert not (tmp_path / "out").exists()
