"""The original script: the same flags, files and output lines, on GPUs or CPUs, under any launcher.

    CUDA_VISIBLE_DEVICES=0,1,2,3 python -m torch.distributed.launch --nproc_per_node=4 \\
        multi_proc_single_gpu.py --world-size 4 --workers 4
    CUDA_VISIBLE_DEVICES=0,1,2,3 python multi_proc_single_gpu.py --world-size 4
    python multi_proc_single_gpu.py --world-size 1 --evaluate --resume checkpoints/model_best.pth.tar

There is nothing to uncomment: the script detects from its environment whether a launcher started it.
"""

import argparse
import sys
from importlib.util import find_spec

from distributed_mnist.cli.home import expand_home
from distributed_mnist.errors import LaunchError, print_error

_REQUIRED_PACKAGES = ("torch", "numpy", "rich", "requests", "tyro")


def main() -> int:
    """Run the original's job. Returns the exit code."""
    try:
        return _run(_parser().parse_args(expand_home(sys.argv[1:])))
    except (Exception, KeyboardInterrupt) as error:
        return print_error(error)


def _run(flags: argparse.Namespace) -> int:
    missing = [name for name in _REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise LaunchError(
            f"{', '.join(missing)} {verb} not installed for this python: run `make setup`, then "
            ".venv/bin/python multi_proc_single_gpu.py ..."
        )
    from distributed_mnist.cli import original_script  # noqa: PLC0415 - imports the packages checked above

    return original_script.main(original_script.Options(**vars(flags)))


def _parser() -> argparse.ArgumentParser:
    """A parser for the original's flags."""
    parser = argparse.ArgumentParser(description="Train a linear classifier on MNIST.")
    add = parser.add_argument
    add("--root", default="data", help="data folder; missing files are downloaded into it (default: data)")
    add("-j", "--workers", type=int, metavar="N", help="has no effect: there are no loader processes")
    add("--epochs", type=int, default=20, help="total number of epochs (default: 20)")
    add("--start-epoch", type=int, default=0, metavar="N", help="epoch to start at, without --resume")
    add("--batch-size", type=int, default=256, help="summed over all processes (default: 256)")
    add(
        "--lr",
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="LR",
        help="initial learning rate (default: 0.001)",
    )
    add(
        "--momentum",
        type=float,
        metavar="M",
        help="has no effect, as in the original, which trains with Adam",
    )
    add(
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=float,
        metavar="W",
        help="has no effect, as in the original",
    )
    add("--resume", default="", metavar="PATH", help="checkpoint to resume from, the original's or ours")
    add("-e", "--evaluate", action="store_true", help="only evaluate on the test images")
    add("--backend", default="nccl", help="nccl, gloo or xccl (default: nccl, or gloo without GPUs)")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    add("-i", "--init-method", metavar="URL", help="has no effect: a free port is chosen automatically")
    add("-s", "--world-size", type=int, default=1, help="number of processes to start (default: 1)")
    add("-r", "--rank", type=int, help="has no effect: ranks are assigned automatically")
    add("--seed", type=int, default=0, help="seed for everything random (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
