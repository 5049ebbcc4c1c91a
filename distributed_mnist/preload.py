"""Imported by the server process that our workers are forked from: once, what all of them need."""

import torch._dynamo  # noqa: F401 - the first optimizer imports it, which takes a second of its own

from . import classic_job, workers  # noqa: F401
