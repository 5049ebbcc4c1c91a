"""The original script's command: the same flags, files and lines, on GPUs or CPUs, on any launcher.

    CUDA_VISIBLE_DEVICES=0,1,2,3 python -m torch.distributed.launch --nproc_per_node=4 \\
        multi_proc_single_gpu.py --world-size 4 --workers 4
    CUDA_VISIBLE_DEVICES=0,1,2,3 python multi_proc_single_gpu.py --world-size 4
    python multi_proc_single_gpu.py --world-size 1 --evaluate --resume checkpoints/model_best.pth.tar

Nothing to uncomment: whether a launcher started this process is seen from its environment.
"""

import argparse
import sys
from importlib.util import find_spec

from distributed_mnist.errors import LaunchError, print_error

_NEEDED = ("torch", "numpy", "rich", "requests", "tyro")


def main() -> int:
    """Run the original's job; the exit code."""
    try:
        return _run(_parser().parse_args())
    except (Exception, KeyboardInterrupt) as error:
        return print_error(error)


def _run(flags: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        are = "are" if missing[1:] else "is"
        raise LaunchError(
            f"{', '.join(missing)} {are} not installed for this python: run `make setup`, then "
            ".venv/bin/python multi_proc_single_gpu.py ..."
        )
    from distributed_mnist.cli import original_script  # noqa: PLC0415 - needs what was looked for above

    return original_script.main(original_script.Options(**vars(flags)))


def _parser() -> argparse.ArgumentParser:
    """The original's flags."""
    parser = argparse.ArgumentParser(description="Train a linear classifier on MNIST.")
    add = parser.add_argument
    add(
        "--root", default="data", help="folder with the data; downloaded into it if missing (default: data)"
    )
    add("-j", "--workers", type=int, metavar="N", help="no longer needed: there are no loader processes")
    add("--epochs", type=int, default=20, help="epochs in all (default: 20)")
    add("--start-epoch", type=int, default=0, metavar="N", help="epoch to begin at without --resume")
    add("--batch-size", type=int, default=256, help="over all processes together (default: 256)")
    add(
        "--lr",
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="LR",
        help="initial rate (default: 0.001)",
    )
    add(
        "--momentum",
        type=float,
        metavar="M",
        help="without effect, as in the original: it trains with Adam",
    )
    add(
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=float,
        metavar="W",
        help="without effect likewise",
    )
    add("--resume", default="", metavar="PATH", help="checkpoint to go on from, the original's or ours")
    add("-e", "--evaluate", action="store_true", help="only score the test images")
    add("--backend", default="nccl", help="nccl, gloo or xccl (default: nccl; gloo without GPUs)")
    add("--local_rank", "--local-rank", type=int, help="given by torch.distributed.launch")
    add("-i", "--init-method", metavar="URL", help="no longer needed: a free port is found")
    add("-s", "--world-size", type=int, default=1, help="processes to start (default: 1)")
    add("-r", "--rank", type=int, help="no longer needed: ranks are given out")
    add("--seed", type=int, default=0, help="key of everything random (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
