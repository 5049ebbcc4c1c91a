"""Several hosts on one machine, for tests: network namespaces, each with its own addresses and names.

    with Network(2) as (near, far):
        near.start(["dmnist", "train", ...], RANK="0", ...)   # a `Program`, as in other tests
        far.cut()                                             # somebody pulls the cable

Each host has one network card, joined by a cable (a veth pair) to one switch (a bridge in a namespace of
its own), and a working directory that no other host uses. Nothing outside is touched, and nothing is left
behind: processes are ended and namespaces removed at the end of the block, however it ends.
"""

import contextlib
import ctypes
import ipaddress
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
from ranks import PATIENCE, Program, WarmProgram
from torchrun_agents import WarmAgent

SUBNET = ipaddress.ip_network("192.168.83.0/24")  # it exists in the namespaces only
_COUNT = itertools.count(1)
# A machine's own name often leads to itself, not to its network: Debian writes 127.0.1.1 into /etc/hosts.
_NAMES = "127.0.0.1 localhost\n127.0.1.1 {own}\n{others}"
_NEW_MOUNTS, _NEW_HOST_NAME, _NEW_NETWORK = 0x20000, 0x4000000, 0x40000000  # of <sched.h>


class Host:
    """One of the hosts: its `name` and `address`, and `folder`, where its programs start."""

    def __init__(self, name: str, address: str, switch: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder / name
        self._namespace, self._switch, self._port = _unique(name), switch, f"to-{name}"
        self._names = folder / f"{name}.names"
        self._programs = contextlib.ExitStack()

    def connect(self) -> None:
        """Make the host and its cable to the switch."""
        _do(f"ip netns add {self._namespace}")
        cable = f"card netns {self._namespace} type veth peer {self._port} netns {self._switch}"
        _do(f"ip link add {cable}")
        _do(f"ip -n {self._namespace} addr add {self.address}/{SUBNET.prefixlen} dev card")
        _do(f"ip -n {self._namespace} link set lo up")
        _do(f"ip -n {self._namespace} link set card up")
        _do(f"ip -n {self._switch} link set {self._port} master bridge up")
        self.folder.mkdir()

    def know(self, hosts: Sequence["Host"]) -> None:
        """Names to addresses, as the programs on this host see them."""
        others = "".join(f"{host.address} {host.name}\n" for host in hosts if host is not self)
        self._names.write_text(_NAMES.format(own=self.name, others=others))

    def start(
        self, command: Sequence[object], first: Callable[[], None] | None = None, /, **variables: str
    ) -> Program:
        """A `WarmProgram` on this host, which ends with it at the latest. It first calls `first()`."""
        before = partial(_enter, self._namespace, self._names, self.name, first)
        return self._programs.enter_context(WarmProgram(command, before, cwd=self.folder, **variables))

    def start_agent(self, command: Sequence[object], **variables: str) -> WarmAgent:
        """The same for torchrun, as a `WarmAgent`."""
        before = partial(_enter, self._namespace, self._names, self.name, None)
        return self._programs.enter_context(WarmAgent(command, before, cwd=self.folder, **variables))

    def cut(self) -> None:
        """Pull the cable out at the switch: what is sent goes nowhere, and nobody is told."""
        _do(f"ip -n {self._switch} link set {self._port} down")

    def mend(self) -> None:
        """Put it back."""
        _do(f"ip -n {self._switch} link set {self._port} up")

    def switch_off(self) -> None:
        """The host's own network card goes down: it has no way to anybody, and knows it."""
        _do(f"ip -n {self._namespace} link set card down")

    def forget(self, other: "Host") -> None:
        """Lose the way to another host."""
        _do(f"ip -n {self._namespace} route add unreachable {other.address}/32")

    def slow(self, discipline: str) -> None:
        """Queue what this host sends as `tc` would have it; skips the test where the kernel cannot."""
        if problem := _problem(f"tc -n {self._namespace} qdisc replace dev card root {discipline}"):
            pytest.skip(f"tc cannot do this here, {discipline}: {problem}")

    def pids(self) -> list[int]:
        """Everything that runs on this host."""
        return [int(pid) for pid in _do(f"ip netns pids {self._namespace}").split()]

    def die(self) -> None:
        """The cable is out and every process gone, all at once."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """End every process on this host, including those that start in the meantime."""
        deadline = time.monotonic() + PATIENCE
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"{pids} on {self.name} survive SIGKILL"
            time.sleep(0.01)

    def remove(self) -> None:
        """No trace of it, however far it came."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.kill()
        self._programs.close()
        _problem(f"ip netns del {self._namespace}")


class Network:
    """Hosts joined by a switch. Entering the block makes them, or skips the test where none can be made."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> list[Host]:
        if problem := cannot_make_hosts():
            pytest.skip(f"no network namespaces here: {problem}")
        with contextlib.ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="dmnist-hosts-"))
            stack.callback(shutil.rmtree, folder)
            switch = _unique("switch")
            stack.callback(_problem, f"ip netns del {switch}")
            _do(f"ip netns add {switch}")
            _do(f"ip -n {switch} link add bridge up type bridge")
            addresses = itertools.islice(SUBNET.hosts(), self._size)
            hosts = [Host(f"host{i}", str(at), switch, folder) for i, at in enumerate(addresses, start=1)]
            for host in hosts:
                stack.callback(host.remove)
                host.connect()
                host.know(hosts)
            self._stack = stack.pop_all()
        return hosts

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _enter(namespace: str, names: Path, name: str, then: Callable[[], None] | None) -> None:
    """Move this process to a host, with views of the mounts and of the machine's name that end with it."""
    libc = ctypes.CDLL(None, use_errno=True)  # Python 3.12 has these calls in os
    with Path("/run/netns", namespace).open() as file:
        assert libc.setns(file.fileno(), _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(_NEW_MOUNTS | _NEW_HOST_NAME) == 0, os.strerror(ctypes.get_errno())
    _do("mount --make-rprivate /")
    _do(f"mount --bind {names} /etc/hosts")
    Path("/proc/sys/kernel/hostname").write_text(name)
    if then is not None:
        then()


def new_port() -> int:
    """A port that is free on every host, since nothing else runs there."""
    return 29_500 + next(_COUNT)


@cache
def cannot_make_hosts() -> str | None:
    """Why this machine does not let a test make hosts, or None if it does."""
    name = _unique("probe")
    try:
        return (
            _problem(f"ip netns add {name}")
            or _problem(f"ip -n {name} link add bridge type bridge")
            or _problem(f"ip -n {name} link add one type veth peer other")
            or _problem(f"ip netns exec {name} unshare --uts mount --bind /etc/hosts /etc/hosts")
        )
    finally:
        _problem(f"ip netns del {name}")


def _unique(name: str) -> str:
    """Two runs of the tests at the same time do not meet."""
    return f"dmnist-{os.getpid()}-{next(_COUNT)}-{name}"


def _do(command: str) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def _problem(command: str) -> str | None:
    """Run a command; what it complains of, in one line, or None if it worked."""
    try:
        _do(command)
    except FileNotFoundError as error:
        return f"there is no {error.filename} command"
    except subprocess.CalledProcessError as error:
        return " ".join(error.stderr.split()) or str(error)
    return None
