"""Ports, addresses and network interfaces of this host."""

import contextlib
import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterable

import psutil

from ..common.placement import is_loopback
from ..errors import LaunchError, reason


def _find_loopback() -> str:
    """Return the address of the loopback interface: 127.0.0.1, or ::1 on a host that has only this one."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, 0))
            return address
    return "127.0.0.1"


LOOPBACK = _find_loopback()
_FIRST, _COUNT, _TRIES = 20_000, 10_000, 8  # below the ports that operating systems assign by themselves


def derived_ports(job: str) -> tuple[int, ...]:
    """Return a few ports for rank 0 of a job, the same on every rank.

    Rank 0 listens on the first free one. The other ranks try all of them, so an unrelated program on one of
    the ports does not stop the job.
    """
    digest = hashlib.sha256(job.encode()).digest()
    return tuple(_FIRST + int.from_bytes(digest[2 * i : 2 * i + 2], "big") % _COUNT for i in range(_TRIES))


def clean_address(text: str, port: int | None) -> str:
    """Return the host's name or address in `text`, which may have spaces, brackets, a scheme or the port.

    Raises `ValueError`, whose message follows "MASTER_ADDR", for what cannot be one host.
    """
    address = re.sub(r"^\w+://", "", text.strip()).rstrip("/")
    if re.search(r"[\s,;]", address):
        raise ValueError(f"is {text!r}: choose one of these addresses, one that the other hosts reach")
    if with_port := re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+):(\d+)", address):
        address = with_port[1]
        if port is not None and int(with_port[2]) != port:
            raise ValueError(f"is {text!r}, but MASTER_PORT is {port}")
    address = re.sub(r"^\[(.+)\]$", r"\1", address)
    try:
        many = ipaddress.ip_address(address).is_multicast or address == "255.255.255.255"
    except ValueError:
        many = not _is_name(address)
    if many:
        raise ValueError(f"is {text!r}, not the name or address of a host")
    return address


def _is_name(text: str) -> bool:
    """Return whether `text` can be a host's name, which does not end with a number."""
    try:
        name = text.encode("idna").decode()
    except UnicodeError:
        return False
    return bool(re.fullmatch(r"([\w-]+\.)*[\w-]*[A-Za-z_-][\w-]*\.?", name, re.ASCII))


def open_listener(address: str, port: int = 0) -> socket.socket:
    """Listen on this address (empty: all addresses) and port (0: any free one). Raises OSError."""
    dual = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=dual, backlog=1024)


def require_loopback() -> None:
    """Raise LaunchError if the loopback interface is down: one can listen there, but not connect."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((LOOPBACK, 9))  # looks up the route; sends nothing
    except OSError as error:
        raise LaunchError(
            f"the processes cannot reach each other at {LOOPBACK}: {reason(error)}; is the loopback "
            "interface up (ip link set lo up)?"
        ) from None


def address_towards(host: str) -> str:
    """Return this host's address on the route to `host`; empty if there is no route except loopback."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # looks up the route; sends nothing
            mine = probe.getsockname()[0].partition("%")[0]
        # A link-local address means something only together with an interface.
        return "" if is_loopback(mine) or ipaddress.ip_address(mine).is_link_local else mine
    return ""


def is_here(host: str) -> bool:
    """Return whether `host` is a name or address of this host."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


def interface_of(addresses: Iterable[str]) -> str | None:
    """Return the network interface that has the first of these addresses that is not empty."""
    mine = next(filter(None, addresses), None)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in entries):
            return name
    return None
