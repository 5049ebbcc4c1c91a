"""The network that is exported: it maps the bytes of images to logits, and includes the normalisation.

Each exported file also holds metadata as text, with all that a user needs to run and trust it. See
`make_metadata`.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property

import torch
from torch import Tensor, nn

from ..common.installed import version
from ..config import MNIST_SHAPE, ImageShape, stored_shape
from ..data.split import normalise
from ..inference.trained import Trained
from ..runs.run_files import read_score

OUTPUT = "logits: float32 (n, classes), in the order of class_names; softmax makes probabilities of them"
PRODUCER = "dmnist export"
"""Start of each file's metadata field `producer`. It distinguishes an export from a user's other files."""

Metadata = dict[str, str]
"""A file's metadata. Lists and objects are in JSON. Numbers are written so that they read back exactly."""


class InferenceModule(nn.Module):
    """A network with its normalisation: maps images to logits `(n, classes)` float32.

    Images are uint8 `(n, h, w)` or, in colour, `(n, h, w, 3)`. `image_shape` is the one that it takes.

    It computes in fp32, whatever the precision of training. bf16 autocast depends on the machine, and a
    graph with autocast inside would be slow or impossible to run elsewhere.
    """

    def __init__(self, network: nn.Module, mean: float, std: float, image_shape: ImageShape) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = mean, std
        self.image_shape = image_shape
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.network(normalise(images, self.mean, self.std))

    @cached_property
    def graph(self) -> torch.export.ExportedProgram:
        """The module as a graph for any batch size, which several formats share.

        Raises `torch.export`'s errors if the model branches on values or works for one batch size only.
        """
        any_batch_size = {"images": {0: torch.export.Dim("n", min=1)}}
        # torch would make a batch size of 1 a constant.
        example = torch.zeros(2, *stored_shape(self.image_shape), dtype=torch.uint8)
        with torch.no_grad(), quiet():
            program = torch.export.export(self, (example,), dynamic_shapes=any_batch_size)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # file names and paths of this machine
        return program


def describe_input(shape: ImageShape) -> str:
    """Describe the images that an exported network takes."""
    if shape == MNIST_SHAPE:
        return "images: uint8 (n, 28, 28), white on black, 0 to 255 as in MNIST's files; n is 1 or more"
    sizes = ", ".join(map(str, stored_shape(shape)))
    colours = "; the last dimension is red, green, blue" if shape[0] == 3 else ""
    return f"images: uint8 (n, {sizes}), 0 to 255 as in the training images; n is 1 or more{colours}"


def make_metadata(trained: Trained) -> Metadata:
    """The metadata of an export.

    It contains the test accuracy if the run's `result.json` is for the same weights. Raises
    `CheckpointError` if that file cannot be read.
    """
    sha256 = trained.weights_sha256
    metadata = {
        "producer": f"{PRODUCER} {version('distributed-mnist')}",
        "input": describe_input(trained.image_shape),
        "output": OUTPUT,
        "class_names": json.dumps(trained.class_names),
        "dataset": trained.dataset,
        "mean": repr(trained.mean),
        "std": repr(trained.std),
        "normalisation": "(pixel / 255 - mean) / std",
        "model": trained.recipe.model,
        "precision": "fp32",
        "weights_sha256": sha256,
    }
    if trained.content["recipe"]:  # the original script's checkpoints do not have one
        metadata["recipe"] = json.dumps(trained.content["recipe"])
    result = read_score(trained.folder) or {}
    if result.get("weights_sha256") == sha256 and "test_accuracy" in result:
        metadata["test_accuracy"] = repr(result["test_accuracy"])
    return metadata


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what torch's exporters print and log. They raise errors for problems with the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # as of a missing torchvision, which we do not use
    try:
        # Without the redirection they print the whole graph if they fail.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            # torch warns about its own use of its own classes.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logging.disable(before)
