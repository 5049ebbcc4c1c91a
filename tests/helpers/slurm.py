"""A real Slurm for tests: munged, slurmctld and two virtual nodes on this machine, in a temporary folder.

    with cluster() as slurm:
        job = slurm.submit("--nodes=2", "train.sbatch", cwd=folder)
        assert job.ended() == "COMPLETED"

A Slurm that runs here already is not touched: ports are free ones; keys, sockets, state and logs are in the
folder. Leaving the block ends the jobs and then the daemons, each by its pid.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ranks import DMNIST, PATIENCE, Finished, environment, free_ports

NODES = ("n1", "n2")
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")
_PATH = os.pathsep.join([str(Path(*DMNIST).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# A requeued job starts again when its old credentials have expired, by default after two minutes (five
# seconds is the least), and when the queue is looked at next, by default once a minute.
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=2000
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=2000
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be brought up here, or None if it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)" if absent else None


class Slurm:
    """What a test does with the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}

    def call(self, *command: object, cwd: Path | None = None, **variables: str) -> Finished:
        """Run a client (`srun`, `scontrol`, ...) to its end."""
        ended = subprocess.run(
            [_program(str(command[0])), *map(str, command[1:])],
            check=False,
            cwd=cwd or self.folder,
            env=environment(**{**self.variables, **variables}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    def submit(self, *words: object, cwd: Path, **variables: str) -> "Job":
        """`sbatch WORDS...` from `cwd`."""
        submitted = self.call("sbatch", "--parsable", *words, cwd=cwd, **variables)
        assert submitted.code == 0, submitted
        return Job(self, submitted.stdout.strip(), cwd)

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        ends = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n\n".join(ends)


class Job:
    """A batch job."""

    def __init__(self, slurm: Slurm, number: str, cwd: Path) -> None:
        self._slurm, self.number, self.cwd = slurm, number, cwd

    def shown(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and the like."""
        lines = self._slurm.call("scontrol", "--oneliner", "show", "job", self.number).stdout.split()
        return dict(word.split("=", 1) for word in lines if "=" in word)

    def output(self) -> str:
        """What it has printed so far."""
        path = self.cwd / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def cancel(self, *flags: object) -> None:
        """`scancel FLAGS...`: ends it, or sends it a signal."""
        cancelled = self._slurm.call("scancel", *flags, self.number)
        assert cancelled.code == 0, cancelled

    def ended(self) -> str:
        """Wait until it is over for good; the state it is in then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        return self.wait_for(
            lambda: next((s for s in over if s == self.shown()["JobState"]), ""), "its end"
        )

    def pid(self, rank: int) -> int:
        """The process that is this rank of its first step."""
        wanted = {f"SLURM_JOB_ID={self.number}", "SLURM_STEP_ID=0", f"SLURM_PROCID={rank}"}
        found = [pid for pid, variables in _environments() if wanted <= variables]
        assert len(found) == 1, found
        return found[0]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until `condition()` is true, and return it."""
        return _wait_for(
            condition, lambda: f"{what} never came: {self.shown()}\n{self.output()}\n{self._slurm.logs()}"
        )


@contextlib.contextmanager
def cluster() -> Iterator[Slurm]:
    """Slurm with two idle nodes, for the length of a `with` block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: there are sockets in it
    folder.chmod(0o755)
    slurm = Slurm(folder)
    with contextlib.ExitStack() as running:
        running.callback(shutil.rmtree, folder, ignore_errors=True)
        _munge(folder, running)
        text = _CONFIGURATION.format(folder=folder, ports=free_ports(3), nodes=NODES)
        (folder / "slurm.conf").write_text(text)
        if _version(slurm) >= (24, 5):  # which insists on a cgroup of its own unless told otherwise
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        running.callback(_end_strays, slurm)
        daemons = [("slurmctld", "-D"), *(("slurmd", "-D", "-N", node) for node in NODES)]
        started = [_start(running, folder, words, slurm.variables) for words in daemons]
        running.callback(_end_jobs, slurm)

        def idle() -> bool:
            assert all(daemon.poll() is None for daemon in started), slurm.logs()
            return slurm.call("sinfo", "--noheader", "--format=%t %D").stdout.split() == ["idle", "2"]

        _wait_for(idle, slurm.logs)
        yield slurm


def _version(slurm: Slurm) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", slurm.call("slurmctld", "-V").stdout)
    return tuple(map(int, numbers[:2]))


def _munge(folder: Path, running: contextlib.ExitStack) -> None:
    """Slurm's messages are signed by a daemon; ours, with a key of its own."""
    key, server = folder / "munge.key", folder / "munge.socket"
    subprocess.run([_program("mungekey"), "--create", f"--keyfile={key}"], check=True)
    log = folder / "munge.log"
    files = [f"--socket={server}", f"--key-file={key}", f"--log-file={log}"]
    files += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "seed")]
    _start(running, folder, ["munged", "--foreground", "--force", *files], {})
    _wait_for(server.exists, lambda: log.read_text() if log.exists() else "munged wrote no log")


def _start(
    running: contextlib.ExitStack, folder: Path, command: Sequence[str], variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a daemon that stays in the foreground; leaving `running` ends it."""
    process = subprocess.Popen(
        [_program(command[0]), *command[1:]],
        cwd=folder,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    running.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(slurm: Slurm) -> None:
    """Kill what still runs, and wait until the nodes have seen to it."""
    slurm.call("scancel", "--signal=KILL", "--full", "--user=root")
    slurm.call("scancel", "--user=root")
    deadline = time.monotonic() + 20
    while slurm.call("squeue", "--noheader").stdout and time.monotonic() < deadline:
        time.sleep(0.05)


def _end_strays(slurm: Slurm) -> None:
    """Kill, by pid, what the daemons left: whatever has this cluster's configuration in its environment."""
    for pid, variables in _environments():
        if f"SLURM_CONF={slurm.folder}/slurm.conf" in variables:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _environments() -> Iterator[tuple[int, set[str]]]:
    """The variables, as `NAME=VALUE`, that each process was started with."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield int(entry.name), set((entry / "environ").read_text(errors="replace").split("\0"))


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found, f"{name} is not installed"
    return found


def _wait_for(condition: Callable[[], Any], explain: Callable[[], str]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, explain()
        time.sleep(0.3)  # most conditions ask Slurm, which costs time that its jobs need
    return value
