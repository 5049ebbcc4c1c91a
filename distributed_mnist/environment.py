"""Settings that libraries read from the environment once, before they start. The user's own come first."""

import os


def order_additions() -> None:
    """cuBLAS adds in a fixed order only if it is told how much workspace to use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def talk_over(interface: str) -> None:
    """gloo uses the interface that this host's own name resolves to: on many hosts that is the loopback,
    which leads to no other host."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
