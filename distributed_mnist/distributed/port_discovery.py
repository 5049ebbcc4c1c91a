"""Find rank 0's port if the launcher does not pass one to all ranks (Slurm, MPI).

All ranks derive the same few ports from the job's name. Rank 0 listens on the first free one. It answers
every connection with a hash of the job's name and the port of its store, which may be any port. The other
ranks try each port until one answers with the hash of their job's name. An unrelated program on one of the
ports delays the job by a second, but does not stop it.
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

_FIRST, _COUNT, _TRIES = 20_000, 10_000, 8  # below the ports that operating systems assign by themselves


def derived_ports(job: str) -> tuple[int, ...]:
    """Return the ports of a job, the same on every rank."""
    digest = hashlib.sha256(job.encode()).digest()
    return tuple(_FIRST + int.from_bytes(digest[2 * i : 2 * i + 2], "big") % _COUNT for i in range(_TRIES))


def open_listener(port: int = 0) -> socket.socket:
    """Listen on this port (0: any free one) for IPv4 and, if the host has it, IPv6. Raises OSError."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)


def announce(ports: tuple[int, ...], job: str, store_port: int) -> None:
    """Answer on the first free port until this process ends. Raises `LaunchError` if none is free."""
    problem = ""
    for port in ports:
        try:
            listener = open_listener(port)
        except OSError as error:
            problem = reason(error)
        else:
            greeting = _greeting(job, store_port)
            threading.Thread(target=_answer, args=(listener, greeting), daemon=True).start()
            return
    raise LaunchError(f"none of the ports {', '.join(map(str, ports))} can be opened: {problem}")


def wait_for(host: str, port: int, seconds: float, hint: str = "") -> None:
    """Wait until something listens at this address. Raises `LaunchError`, with `hint`, after `seconds`.

    The store's own client would also wait, but signal handlers do not run during that wait.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"nothing listens at {host} port {port}: {reason(error)}{hint}") from None
        time.sleep(0.02)


def address_towards(host: str) -> str:
    """Return this host's address on the route to `host`; empty if there is no route except loopback."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # looks up the route; sends nothing
            mine = probe.getsockname()[0].partition("%")[0]
        return "" if ipaddress.ip_address(mine).is_loopback else mine
    return ""


def interface_towards(hosts: Iterable[str]) -> str | None:
    """Return the network interface on the route to the first of `hosts` that is not this host."""
    mine = next(filter(None, map(address_towards, hosts)), None)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in addresses):
            return name
    return None


def find(host: str, ports: tuple[int, ...], job: str, seconds: float) -> int:
    """Return the store port that this job's rank 0 announces. Raises `LaunchError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for port in ports:
            try:
                with socket.create_connection((host, port), timeout=1) as connection:
                    lines = [*connection.recv(1024).decode(errors="replace").split("\n"), "", ""]
            except OSError:
                continue
            if lines[0] == _greeting(job, 0).partition("\n")[0] and lines[1].isdecimal():
                return int(lines[1])
        time.sleep(0.1)
    tried = ", ".join(map(str, ports))
    raise LaunchError(
        f"rank 0 of this job does not answer at {host} on ports {tried} within {seconds:.0f} s"
    )


def _greeting(job: str, store_port: int) -> str:
    return f"dmnist {hashlib.sha256(job.encode()).hexdigest()}\n{store_port}\n"


def _answer(listener: socket.socket, greeting: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(greeting.encode())
        except OSError:  # this client has disconnected; keep serving the others
            time.sleep(0.01)
