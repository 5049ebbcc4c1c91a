"""Imported by the server process that our workers are forked from, and by nothing else.

It imports once what all workers need, and makes the server deaf to the signals that ask a run to stop: a
scheduler sends them to every process of a job, and the server must outlive the workers to tell how they
ended. A worker listens again as soon as it runs.
"""

import signal

from . import classic_job, workers  # noqa: F401
from .signals import SIGNALS

for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
