"""Imported by the server process that our workers are forked from: once, what all of them need."""

from . import classic_job, workers  # noqa: F401
