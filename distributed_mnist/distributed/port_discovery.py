"""How ranks find rank 0 where no launcher passes a port around (Slurm, MPI).

All ranks derive the same few ports from the job's name. Rank 0 opens the first that is free and answers
there with the job's name and the port of its store, which may be any; the others ask each in turn until
one answers with their job's name. Whoever else listens on one of these ports costs a second, not the job.
"""

import contextlib
import hashlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterable

import psutil

from ..errors import LaunchError, reason

_FIRST, _COUNT, _TRIES = 20_000, 10_000, 8  # below the ports that systems hand out by themselves


def derived_ports(job: str) -> tuple[int, ...]:
    """The ports of a job, the same on every rank."""
    words = hashlib.sha256(job.encode()).digest()
    return tuple(_FIRST + int.from_bytes(words[2 * i : 2 * i + 2], "big") % _COUNT for i in range(_TRIES))


def announce(ports: tuple[int, ...], job: str, store_port: int) -> None:
    """Answer on the first free port for the rest of this process's life. Raises `LaunchError`."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    problem = ""
    for port in ports:
        try:
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            problem = reason(error)
        else:
            greeting = _greeting(job, store_port)
            threading.Thread(target=_answer, args=(listener, greeting), daemon=True).start()
            return
    raise LaunchError(f"none of the ports {', '.join(map(str, ports))} can be opened: {problem}")


def wait_for(host: str, port: int, seconds: float, hint: str = "") -> None:
    """Return when something listens there. Raises `LaunchError`, with `hint`, after `seconds`.

    The store's own client waits too, but deaf to signals.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"nobody listens at {host} port {port}: {reason(error)}{hint}") from None
        time.sleep(0.02)


def address_towards(host: str) -> str:
    """This host's own address on the way to `host`; empty if there is no way, or none that leaves it."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # asks for the route; nothing is sent
            mine = probe.getsockname()[0].partition("%")[0]
        return "" if ipaddress.ip_address(mine).is_loopback else mine
    return ""


def interface_towards(hosts: Iterable[str]) -> str | None:
    """This host's network interface that leads to the first of `hosts` that is another host."""
    mine = next(filter(None, map(address_towards, hosts)), None)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in addresses):
            return name
    return None


def find(host: str, ports: tuple[int, ...], job: str, seconds: float) -> int:
    """The port of the store that this job's rank 0 announces. Raises `LaunchError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for port in ports:
            try:
                with socket.create_connection((host, port), timeout=1) as asked:
                    words = [*asked.recv(1024).decode(errors="replace").split("\n"), "", ""]
            except OSError:
                continue
            if words[0] == _greeting(job, 0).partition("\n")[0] and words[1].isdecimal():
                return int(words[1])
        time.sleep(0.1)
    listed = ", ".join(map(str, ports))
    raise LaunchError(f"no rank 0 of this job answers at {host} on ports {listed} within {seconds:.0f} s")


def _greeting(job: str, store_port: int) -> str:
    return f"dmnist {hashlib.sha256(job.encode()).hexdigest()}\n{store_port}\n"


def _answer(listener: socket.socket, greeting: str) -> None:
    while True:
        try:
            asker, _ = listener.accept()
            with asker:
                asker.sendall(greeting.encode())
        except OSError:  # who asked is gone; the next may not be
            time.sleep(0.01)
