"""Train with the plain loop of PyTorch tutorials, as a baseline for `dmnist bench`, which alone runs it.

It uses a data set of single samples, a DataLoader, a DistributedSampler, and DistributedDataParallel over
gloo, or over NCCL on GPUs.

    python -m distributed_mnist.bench.baseline --data DIR --model linear --nproc 2 \\
        [--workers 4] [--seconds 5]

prints one JSON object. It uses the program's networks and data files, and no other part of it.
"""

import argparse
import json
import math
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..common.placement import physical_cores
from ..data.datasets import load
from ..models.zoo import MODELS


class Samples(Dataset[tuple[Tensor, int]]):
    """Returns one image at a time, scaled and normalised like torchvision's transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[index].unsqueeze(0).to(torch.float32).div(255)
        mean, std = torch.tensor([0.1307]).view(-1, 1, 1), torch.tensor([0.3081]).view(-1, 1, 1)
        return image.sub_(mean).div_(std), int(self._labels[index])


def work(rank: int, options: argparse.Namespace, port: int) -> None:
    """Train in one process. Rank 0 prints the results."""
    warnings.simplefilter("ignore")
    size = options.nproc
    torch.set_num_threads(max(1, physical_cores() // size))
    device = torch.device("cpu") if options.device == "cpu" else torch.device(options.device, rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    data = load(options.dataset, Path(options.data), download=False)
    train = Samples(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
    test = Samples(torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))
    torch.manual_seed(0)
    model = DistributedDataParallel(MODELS[options.model](len(data.class_names)).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(train)
    batch = options.batch_size // size
    loader = DataLoader(train, batch_size=batch, sampler=sampler, num_workers=options.workers)
    test_loader = DataLoader(test, batch_size=batch, num_workers=options.workers)
    stopwatch = Stopwatch(options.seconds, device)
    epochs: list[dict[str, float]] = []
    while not stopwatch.over and (len(epochs) < options.epochs or options.seconds < math.inf):
        sampler.set_epoch(len(epochs))
        began = time.perf_counter()
        train_epoch(model, loader, optimizer, stopwatch, device)
        trained = time.perf_counter()
        accuracy = score(model, test_loader, device) if options.seconds == math.inf else 0.0
        tested = time.perf_counter() - trained
        epochs.append({"train_seconds": trained - began, "test_seconds": tested, "test_accuracy": accuracy})
    if rank == 0:
        speed = stopwatch.images * size / stopwatch.seconds
        sys.stdout.write(json.dumps({"images_per_second": speed, "epochs": epochs}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


class Stopwatch:
    """Counts images and seconds from the fifth batch, because the first batches of a process are slow."""

    def __init__(self, limit: float, device: torch.device) -> None:
        self._limit, self._device, self._batches, self._began = limit, device, 0, 0.0
        self.images, self.seconds, self.over = 0, 0.0, False

    def count(self, images: int) -> None:
        """Count a batch. All processes must stop after the same one, so they agree at every sixteenth."""
        self._batches += 1
        if self._batches <= 4:
            self._began = time.perf_counter()
            return
        self.images += images
        self.seconds = time.perf_counter() - self._began
        if self._limit < math.inf and self._batches % 16 == 0:
            processes_over = torch.tensor([float(self.seconds > self._limit)], device=self._device)
            dist.all_reduce(processes_over)
            self.over = bool(processes_over > 0)


def train_epoch(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, int]],
    optimizer: torch.optim.Optimizer,
    stopwatch: Stopwatch,
    device: torch.device,
) -> None:
    """Train one epoch on this process's part, with running metrics, or until the time is up."""
    model.train()
    loss_sum, correct = 0.0, 0
    for images, labels in (to(device, batch) for batch in loader):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)  # on a GPU this waits for the step, so it is timed whole
        correct += int((logits.argmax(1) == labels).sum().item())
        stopwatch.count(len(labels))
        if stopwatch.over:
            break


def to(device: torch.device, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch's images and labels on this device."""
    images, labels = batch
    return images.to(device), labels.to(device)


@torch.no_grad()
def score(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], device: torch.device) -> float:
    """Return the test accuracy, 0 to 1. Every process scores all images."""
    model.eval()
    batches = (to(device, batch) for batch in loader)
    hits = [int((model(images).argmax(1) == labels).sum()) for images, labels in batches]
    return sum(hits) / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    """Parse the flags and start the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="linear")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after this long")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    mp.spawn(work, (options, port), nprocs=options.nproc)


if __name__ == "__main__":
    main()
