"""Detect which launcher started this process, and read its rank and world size.

Only this file reads the environment variables of launchers. It supports torchrun (and
torch.distributed.launch, Kubeflow, and anything else that sets the same variables), Slurm's srun, and MPI's
mpirun. Our own launcher (`launcher/spawn.py`) needs no variables. Variables of other launchers with several
processes are an error: each process would train alone, and waste all the others.
"""

import dataclasses
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from ..common.placement import Placement, is_loopback
from ..errors import LaunchError
from .job_key import secret_in
from .network import LOOPBACK, clean_address, derived_ports

_OPENMPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_MVAPICH = tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_TORCHRUN_COMMAND = re.compile(r"torchrun|torch\.distributed|torch/distributed")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_WITH = (
    "torchrun --nnodes {} --node-rank {} --master-addr {} --nproc-per-node N -m distributed_mnist ..."
)
_UNKNOWN = {
    "PET_NNODES": "torchrun -m distributed_mnist ..., which reads the PET_ variables",
    "SKYPILOT_NUM_NODES": _TORCHRUN_WITH.format(
        "$SKYPILOT_NUM_NODES", "$SKYPILOT_NODE_RANK", '"$(head -n1 <<< "$SKYPILOT_NODE_IPS")"'
    ),
    "LWS_GROUP_SIZE": _TORCHRUN_WITH.format("$LWS_GROUP_SIZE", "$LWS_WORKER_INDEX", "$LWS_LEADER_ADDRESS"),
    "SM_HOSTS": "SageMaker's distribution={'torch_distributed': {'enabled': True}}",
    "HOROVOD_SIZE": "mpirun or torchrun",
    "FLUX_JOB_SIZE": "mpirun or torchrun",
}
"""For the variable with the number of processes or hosts (of SageMaker: the list of hosts): what to use."""
_ALLOCATED_NODES = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "PBS_NUM_NODES")


def detect(env: Mapping[str, str] = os.environ) -> Placement | None:
    """Return this process's placement, or None if no launcher started it.

    Raises `LaunchError`, naming the variable, if variables are missing or have impossible values.
    """
    placement = _placement(env)
    return placement and dataclasses.replace(placement, secret=secret_in(env))


def unused_nodes(env: Mapping[str, str] = os.environ) -> str | None:
    """Return a note if the scheduler gave this job several nodes, but this process will use only its own.

    This may be intended, as in an interactive shell. Call it if `detect` returns None.
    """
    if "SLURM_STEP_NUM_TASKS" in env:
        return None
    count = max((int(env[name]) for name in _ALLOCATED_NODES if env.get(name, "").isdecimal()), default=1)
    if count == 1:
        return None
    command = "mpirun" if "PBS_NUM_NODES" in env else "srun"
    return f"this job has {count} nodes, and this command uses one of them: {command} dmnist ... uses all"


def _placement(env: Mapping[str, str]) -> Placement | None:
    if "RANK" in env or "WORLD_SIZE" in env or "LOCAL_RANK" in env:
        return _torchrun(env)
    # Under Slurm, mpirun may start its helpers with srun. The ranks then have the helpers' variables too.
    for names in (_OPENMPI, _MVAPICH, _MPICH):
        if names[2] in env:
            return _mpi(env, *names)
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # srun; the batch script itself has no step
        return _slurm(env) if _integer(env, "SLURM_STEP_NUM_TASKS") > 1 else None
    for names in (_OPENMPI, _MVAPICH, _MPICH):
        if any(name in env for name in names):
            return _mpi(env, *names)
    _refuse_unknown(env)
    return None


def _refuse_unknown(env: Mapping[str, str]) -> None:
    """Raise `LaunchError` if this seems to be one of several processes or hosts, but not which one."""
    for name, command in _UNKNOWN.items():
        # `1:4` is torchrun's range of hosts, and `["algo-1","algo-2"]` are SageMaker's hosts.
        if max(map(int, re.findall(r"\d{1,9}", env.get(name, ""))), default=1) > 1:
            raise LaunchError(
                f"{name} is {env[name]}, but the variables do not say which process this is: start it with "
                f"{command}; to use this host alone, unset {name}"
            )
    if env.get("MASTER_ADDR", "").strip() and not is_loopback(_address(env)):
        raise LaunchError(
            f"MASTER_ADDR is set, but RANK is not: a launcher sets all of {', '.join(_TORCHRUN)}; to use "
            "this host alone, unset MASTER_ADDR"
        )


def _torchrun(env: Mapping[str, str]) -> Placement:
    for name in _TORCHRUN:
        if name not in env:
            present = ", ".join(variable for variable in (*_TORCHRUN, "LOCAL_RANK") if variable in env)
            raise LaunchError(
                f"{name} is not set, but {present} is: a launcher sets all of {', '.join(_TORCHRUN)}"
            )
    size = _integer(env, "WORLD_SIZE")
    local_size = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else 1
    elastic = "TORCHELASTIC_RUN_ID" in env
    agent = _torchrun_agent() if elastic else None
    restarts = _integer(env, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in env else 0
    if local_size > 1 and "LOCAL_RANK" not in env:
        raise LaunchError("LOCAL_RANK is not set, but LOCAL_WORLD_SIZE is")
    return _checked(
        Placement(
            rank=_integer(env, "RANK"),
            size=size,
            local_rank=_integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0,
            local_size=local_size,
            host=_address(env),
            ports=(_port(env),),
            store_exists=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            job=f"dmnist/{env.get('TORCHELASTIC_RUN_ID', '')}/{env['MASTER_PORT']}/{size}",
            launcher_id=_process_id(agent) if agent else "",
            parent=os.getppid() if agent else 0,
            restarts=restarts,
            launcher="torchrun" if elastic else "environment",
        ),
        "RANK",
        "WORLD_SIZE",
    )


def _slurm(env: Mapping[str, str]) -> Placement:
    job, step = _text(env, "SLURM_JOB_ID"), _text(env, "SLURM_STEP_ID")
    node = _integer(env, "SLURM_NODEID")
    host = LOOPBACK if _integer(env, "SLURM_STEP_NUM_NODES") == 1 else _first_slurm_host(env)
    name = f"slurm-{job}-{step}-{env.get('SLURM_RESTART_COUNT', '0')}"
    return _checked(
        Placement(
            rank=_integer(env, "SLURM_PROCID"),
            size=_integer(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_integer(env, "SLURM_LOCALID"),
            local_size=_tasks_on_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"), node),
            host=_address(env) if "MASTER_ADDR" in env else host,
            ports=_ports(env, name),
            job=name,
            # Does not contain the restart count, so it stays the same when the job is requeued.
            launcher_id=f"slurm {env.get('SLURM_CLUSTER_NAME', '')} {job}.{step}",
            own_device="SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", ""),
            launcher="srun",
        ),
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
    )


def _mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Placement:
    one_host = _integer(env, size) == _integer(env, local_size)
    if not one_host and "MASTER_ADDR" not in env:
        raise LaunchError(
            "MASTER_ADDR is not set: MPI does not say where rank 0 is; set it to the address of that host"
        )
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_JOBID")
    if job is None and not one_host and "MASTER_PORT" not in env:
        raise LaunchError("MASTER_PORT is not set, and this MPI has no job name to derive a port from")
    name = f"mpi-{job or os.getppid()}"  # on one host, all ranks are children of one launcher
    return _checked(
        Placement(
            rank=_integer(env, rank),
            size=_integer(env, size),
            local_rank=_integer(env, local_rank),
            local_size=_integer(env, local_size),
            host=_address(env) if "MASTER_ADDR" in env else LOOPBACK,
            ports=_ports(env, name),
            job=name,
            launcher="mpirun",
        ),
        rank,
        size,
    )


def _torchrun_agent() -> psutil.Process | None:
    """Return torchrun's agent: the parent, or an ancestor if a shell is in between.

    Returns None if this process cannot see its parents.
    """
    try:
        ancestors = psutil.Process().parents()
        agents = (process for process in ancestors if any(map(_TORCHRUN_COMMAND.search, process.cmdline())))
        return next(agents, ancestors[0] if ancestors else None)
    except psutil.Error:
        return None


def _process_id(process: psutil.Process) -> str:
    """Return an identifier that stays unique on this host even if the process id is reused."""
    try:  # in ticks since the host booted, because other clocks can be changed while programs run
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = str(process.create_time())
    return f"{socket.gethostname()} {process.pid} {started}"


def _checked(placement: Placement, rank: str, size: str) -> Placement:
    if not 0 <= placement.rank < placement.size:
        raise LaunchError(f"{rank} is {placement.rank}, which does not fit {size} {placement.size}")
    if not 0 <= placement.local_rank < placement.local_size and placement.local_size > 1:
        raise LaunchError(
            f"local rank {placement.local_rank} of {placement.local_size} processes on this host"
        )
    return placement


def _ports(env: Mapping[str, str], name: str) -> tuple[int, ...]:
    """Return only MASTER_PORT if it is set, else the ports that every rank derives from the job's name."""
    if "MASTER_PORT" in env:
        return (_port(env),)
    return derived_ports(name)


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """Return rank 0's host: the first host of the job step.

    If its name does not resolve, return the address of the host where srun was called, because a batch
    script runs on the first node.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST")
    host = _first_of_hostlist(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return env.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def _first_of_hostlist(nodes: str) -> str:
    """Return the first host of a Slurm host list: `rack07n1` for `rack[07-09,12]n1,login`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _tasks_on_node(text: str, node: int) -> int:
    """Return the number of tasks on a node. `2(x3),1` means 2, 2, 2, 1 tasks on the four nodes."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE has {len(counts)} nodes")
    return counts[node]


def _address(env: Mapping[str, str]) -> str:
    if not env["MASTER_ADDR"].strip():
        raise LaunchError("MASTER_ADDR is empty")
    try:
        return clean_address(env["MASTER_ADDR"], _port(env) if "MASTER_PORT" in env else None)
    except ValueError as error:
        raise LaunchError(f"MASTER_ADDR {error}") from None


def _port(env: Mapping[str, str]) -> int:
    port = _integer(env, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT is {port}, not a port")
    return port


def _text(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise LaunchError(f"{name} is not set, though srun seems to have started this process")
    return env[name]


def _integer(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise LaunchError(f"{name} is not set")
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name} is {env[name]!r}, not a number") from None
