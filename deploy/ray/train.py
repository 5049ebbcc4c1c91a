"""Train in Ray's workers. Each worker runs `dmnist train` as one process of the group:

    python deploy/ray/train.py 4 --data DIR --out DIR

Copy this file and adapt it. docs/how-to/clusters.md explains it. On several nodes, all of them must see
DIR.
"""

import os
import secrets
import socket
import subprocess
import sys

from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer


def _meeting_point() -> tuple[str, int, str]:
    """Return this host's address, a free port on it, and a secret for the ranks."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    return socket.gethostbyname(socket.gethostname()), port, secrets.token_hex(32)


def work(options: dict[str, list[str]]) -> None:
    """Run one rank. Raise if its process fails, so that Ray restarts all workers."""
    context = train.get_context()
    host, port, secret = broadcast_from_rank_zero(
        _meeting_point() if context.get_world_rank() == 0 else None
    )
    place = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "DMNIST_SECRET": secret,
    }
    command = [sys.executable, "-m", "distributed_mnist", "train", "--resume", "auto", *options["words"]]
    subprocess.run(command, check=True, env=os.environ | {k: str(v) for k, v in place.items()})


if __name__ == "__main__":
    TorchTrainer(
        work,
        train_loop_config={"words": sys.argv[2:]},
        scaling_config=ScalingConfig(num_workers=int(sys.argv[1]), use_gpu=False),  # True: one GPU each
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
