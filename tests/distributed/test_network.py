"""Addresses and interfaces of this host."""

import socket
from typing import Any

import pytest

from distributed_mnist.common.placement import Placement
from distributed_mnist.distributed import network
from distributed_mnist.distributed.rendezvous import Rendezvous
from distributed_mnist.errors import LaunchError


def test_a_loopback_interface_that_is_down_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network.require_loopback()
    # A route that the kernel refuses, as it does for 127.0.0.1 without the interface.
    monkeypatch.setattr(network, "LOOPBACK", "255.255.255.255")
    placement = Placement(rank=0, size=2, local_rank=0, local_size=2, launcher="spawned", secret=b"x" * 32)
    with pytest.raises(
        LaunchError, match=r"cannot reach each other at 255\.255\.255\.255: .*; is the loopback"
    ):
        Rendezvous(placement, None, 60.0, {})


def test_a_host_whose_loopback_has_only_an_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network._find_loopback() == network.LOOPBACK

    def only_ipv6(family: int, *arguments: Any) -> socket.socket:
        if family == socket.AF_INET:
            raise OSError("no such address")
        return Bindable()

    class Bindable(socket.socket):
        def bind(self, address: Any) -> None:
            pass

    monkeypatch.setattr(network.socket, "socket", only_ipv6)
    assert network._find_loopback() == "::1"
