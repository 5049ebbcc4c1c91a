"""A trained network as others run it: from the bytes of images to logits, the normalisation inside.

What a stranger must know to use it, or to trust it, goes into the file as text, see `about`.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.installed import version
from ..data.split import normalise
from ..errors import CheckpointError
from ..inference.trained import Trained

INPUT = "images: uint8 (n, 28, 28), white on black, 0 to 255 as in MNIST's files; n is 1 or more"
OUTPUT = "logits: float32 (n, classes), in the order of class_names; softmax makes probabilities of them"
MARK = "dmnist export"
"""Begins the metadata `producer` of each file: how an export is told from somebody's other file."""

About = dict[str, str]
"""The metadata of a file: values are text, lists and objects as JSON, numbers that read back exact."""


class Exported(nn.Module):
    """A network with its normalisation: images `(n, 28, 28)` uint8 to logits `(n, classes)` float32.

    It computes in fp32, whatever it was trained in: bf16 autocast is a matter of the machine, and a graph
    that had it inside would be slow or impossible elsewhere.
    """

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = mean, std
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.network(normalise(images, self.mean, self.std))


def about(trained: Trained) -> About:
    """The metadata of an export. The test accuracy is there if the run's `result.json` is of these weights.

    Raises `CheckpointError` if that file cannot be read.
    """
    sha256 = trained.weights_sha256
    told = {
        "producer": f"{MARK} {version('distributed-mnist')}",
        "input": INPUT,
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
    if trained.content["recipe"]:  # the original script's checkpoints do not tell theirs
        told["recipe"] = json.dumps(trained.content["recipe"])
    result = _result(trained.folder)
    if result.get("weights_sha256") == sha256 and "test_accuracy" in result:
        told["test_accuracy"] = repr(result["test_accuracy"])
    return told


def _result(folder: Path) -> dict[str, Any]:
    """The `result.json` of a run; empty if there is none."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return result if isinstance(result, dict) else {}


def graph(exported: Exported) -> torch.export.ExportedProgram:
    """The network as a graph for any number of images.

    Raises what `torch.export` does where Python decides by values or the number of images is fixed.
    """
    any_number = {"images": {0: torch.export.Dim("n", min=1)}}
    example = torch.zeros(2, 28, 28, dtype=torch.uint8)  # of one image torch would make a constant
    with torch.no_grad(), quiet():
        program = torch.export.export(exported, (example,), dynamic_shapes=any_number)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody's business
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters print and log of themselves; what is wrong with a model they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # such as that torchvision, which we do not use, is absent
    try:
        # They print the graph that failed, a page.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            # torch's own copying of its own classes.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logging.disable(before)
