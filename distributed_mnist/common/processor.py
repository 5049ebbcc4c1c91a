"""The name of this host's processor."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name that the processor gives itself, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
