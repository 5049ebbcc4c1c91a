"""Run one rank of a command: join the process group, do the work, print the result on rank 0.

The launcher names these functions as `module:function`, so that the process that starts the others need not
import torch.
"""

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.placement import Placement
from ..data import prefetch
from ..data.datasets import Dataset
from ..data.prefetch import PrefetchedData
from ..distributed.peer import common_path, describe_job, describe_training
from ..distributed.world import World
from ..inference.ensemble import evaluate_ensemble
from ..inference.score import evaluate_checkpoint
from ..launcher.rank_process import Body, run_in_group
from ..launcher.signals import StopSignals
from ..reporting.console import make_console, print_json
from ..runs.layout import resume_flags
from ..training import run as training
from .dry_run import Reader, print_plan
from .flags_train import CommonFlags, Train, Verify
from .flags_use import Doctor, Evaluate

Listener = socket.socket | None
"""On rank 0 of our launcher, the socket on which the other ranks reach it."""


def train(
    placement: Placement, listener: Listener, command: Train, prefetched: PrefetchedData | None = None
) -> int:
    """Run one rank of `dmnist train`. Returns its exit code.

    `prefetched` is the data set on rank 0, if our launcher reads it.
    """

    def body(world: World, signals: StopSignals) -> None:
        out, is_member = command.run.out, command.ensemble > 1
        console = make_console(stderr=command.json)
        dry_run = command.dry_run or command.summary
        reader = Reader(command.run, console)
        result = training.run(
            world,
            command.settings,
            command.run,
            title=command.recipe,
            console=console,
            signals=signals,
            read=reader if dry_run else _dataset_reader(command, prefetched),
            tensorboard=command.tensorboard,
            dry_run=dry_run,
            resume_flags=resume_flags(out.parent, command.ensemble) if out and is_member else None,
        )
        if dry_run:
            reader.correct(result)
            _print_result(world, command, result)
            if world.rank == 0 and not command.json:
                print_plan(console, result, dry_run=command.dry_run, summary=command.summary)
        elif not is_member:  # otherwise `vote` prints the result
            _print_result(world, command, result)

    return _run_in_group(placement, listener, body, command, exact=command.settings.sync == "tree")


def vote(
    placement: Placement, listener: Listener, command: Train, prefetched: PrefetchedData | None = None
) -> int:
    """Run one rank of the vote that follows the training of an ensemble. Returns its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        assert command.run.out is not None  # the launcher has chosen it
        result = evaluate_ensemble(
            world,
            command.settings,
            command.run.out,
            command.ensemble,
            console=make_console(stderr=command.json),
            read=_dataset_reader(command, prefetched),
        )
        _print_result(world, command, result)

    return _run_in_group(placement, listener, body, command)


def evaluate(placement: Placement, listener: Listener, command: Evaluate) -> int:
    """Run one rank of `dmnist evaluate`. Returns its exit code."""

    def body(world: World, signals: StopSignals) -> None:
        result = evaluate_checkpoint(
            world,
            command.checkpoint,
            model=command.model,
            dataset=command.dataset,
            folder=command.data,
            console=make_console(stderr=command.json),
        )
        _print_result(world, command, result)

    checkpoint = common_path(command.checkpoint, one_host=placement.one_host)
    job = describe_job("evaluate", checkpoint=checkpoint, model=command.model, dataset=command.dataset)
    return run_in_group(placement, listener, body, device=command.device, job=job, debug=command.debug)


def verify(placement: Placement, listener: Listener, command: Verify) -> int:
    """Run one rank of `dmnist verify`. Returns its exit code."""
    from ..verify import command as exact  # noqa: PLC0415 - no other command needs what it imports
    from ..verify.results_table import ResultsTable  # noqa: PLC0415
    from ..verify.tree import command as tree  # noqa: PLC0415

    def body(world: World, signals: StopSignals) -> None:
        table = ResultsTable.make(as_json=command.json, shown=world.rank == 0)
        if command.sync == "tree":
            tree.run(world, table, signals)
        else:
            exact.run(world, table, minutes=command.minutes, inject=command.inject, seed=command.seed)

    job = describe_job(
        "verify", sync=command.sync, minutes=command.minutes, inject=command.inject, seed=command.seed
    )
    return run_in_group(placement, listener, body, device=command.device, job=job, debug=command.debug)


def doctor(placement: Placement, listener: Listener, command: Doctor) -> int:
    """Run one rank of `dmnist doctor`. Returns its exit code."""
    from ..doctor import command as doctor_command  # noqa: PLC0415 - no other command needs what it imports

    def body(world: World, signals: StopSignals) -> None:
        torch.set_num_threads(1)  # as in training
        console = make_console(stderr=command.json)
        result = doctor_command.run(world, command.out, command.dataset, command.data, console)
        _print_result(world, command, result)
        doctor_command.conclude(result)

    job = describe_job("doctor")
    return run_in_group(placement, listener, body, device=command.device, job=job, debug=command.debug)


def _run_in_group(
    placement: Placement, listener: Listener, body: Body, command: Train, *, exact: bool = True
) -> int:
    return run_in_group(
        placement,
        listener,
        body,
        device=command.run.device,
        exact=exact,
        hang_after=command.run.hang_after,
        job=describe_training("train", command.settings, command.run, one_host=placement.one_host),
        shared=command.run.oversubscribe,
        debug=command.debug,
    )


def _dataset_reader(command: Train, prefetched: PrefetchedData | None) -> Callable[[], Dataset]:
    if prefetched:
        return prefetched.receive
    return partial(prefetch.read, command.run, make_console(stderr=command.json))


def _print_result(world: World, command: CommonFlags, result: dict[str, Any]) -> None:
    """Print the result on rank 0 if `--json` is set."""
    if command.json and world.rank == 0:
        print_json(result)
