"""Load a trained network, with everything needed to use it, from a checkpoint, a run or an ensemble."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..common.digest import digest
from ..common.process_state import torch_defaults
from ..config import MNIST_SHAPE, ImageShape, Recipe
from ..data.catalog import DIGITS, MNIST_CONSTANTS
from ..data.split import normalise
from ..errors import CheckpointError, UsageError
from ..models.build import build, forward, place
from ..models.zoo import MODELS
from ..runs.checkpoint import Content, decode, load_weights, read_bytes, require_weights
from ..runs.layout import (
    checkpoint_path,
    checkpoints_in,
    member_folder,
    members_in,
    original_checkpoints_in,
)
from ..runs.run_files import read_ensemble_result, read_result
from ..user_code.failures import model_failures
from .pixels import as_pixels
from .vote import Vote

_ORIGINAL_DATASET: dict[str, Any] = {
    "name": "mnist",
    "class_names": DIGITS,
    "image_shape": MNIST_SHAPE,
    "mean": MNIST_CONSTANTS[0],
    "std": MNIST_CONSTANTS[1],
}
"""The data set of the original script's checkpoints, which do not record it."""


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode, on its device."""

    network: nn.Module
    """Maps normalised images `(n, channels, h, w)` to logits `(n, classes)`."""
    recipe: Recipe
    class_names: tuple[str, ...]
    mean: float
    """Mean of the training images' pixels, which range from 0 to 1."""
    std: float
    """Standard deviation of the training images' pixels."""
    dataset: str
    """Name of the data set it was trained on."""
    content: Content = field(repr=False)
    """The checkpoint."""
    path: str
    """The checkpoint's path. For an ensemble, its folder."""
    image_shape: ImageShape = MNIST_SHAPE
    """Channels (1 or 3), height and width of the images that it takes."""
    best_step: int | None = None
    """If these are the checkpoint's weights with the best validation accuracy, the step they are from."""

    @property
    def title(self) -> str:
        """The path, and which of its weights these are if they are not those of the checkpoint's step."""
        return self.path if self.best_step is None else f"{self.path}, best weights (step {self.best_step})"

    def __repr__(self) -> str:
        classes = len(self.class_names)
        return f"<Trained: {self.recipe.model} for {classes} classes of {self.dataset}, from {self.path}>"

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights, as the run reports it. For an ensemble, of its members' digests."""
        if isinstance(self.network, Vote):
            return digest([digest(dict(member.state_dict())) for member in self.network.members])
        return digest(dict(self.network.state_dict()))

    @property
    def folder(self) -> Path:
        """The folder of the run, or the ensemble, that the checkpoint belongs to."""
        return Path(self.path) if isinstance(self.network, Vote) else Path(self.path).parent.parent

    def logits(self, images: Any) -> Tensor:
        """Logits, float32 `(n, classes)`, for images like the training images (MNIST's are white on black).

        `images` is a tensor, an array, a PIL image or a sequence of these, of the size in `image_shape`:
        `(n, h, w)`, or in colour `(n, h, w, 3)`, or torch's `(n, channels, h, w)`; without `n` for one
        image. They are not normalised: integers from 0 to 255, or floats from 0 to 1. Raises `DataError`
        for anything else.
        """
        with torch_defaults(), torch.no_grad():
            device = next(self.network.parameters()).device
            pixels = as_pixels(images, self.image_shape)
            if not len(pixels):  # some layers cannot compute with none
                return torch.empty(0, len(self.class_names), device=device)
            normalised = normalise(pixels.to(device, copy=True), self.mean, self.std)
            with model_failures(self.recipe.model):
                return forward(self.network, normalised, self.recipe.precision)

    def probabilities(self, images: Any) -> Tensor:
        """The probability of each class, float32 `(n, classes)`. `images` is as in `logits`."""
        return self.logits(images).softmax(1)

    def predict(self, images: Any) -> Tensor:
        """The most likely class of each image, int64 `(n,)`. These are indices into `class_names`.

        `images` is as in `logits`.
        """
        return self.logits(images).argmax(1)


@dataclass(frozen=True)
class CheckpointFiles:
    """The checkpoint file of a network, or the files of an ensemble's members."""

    path: str
    """The checkpoint, or the ensemble's folder."""
    files: list[tuple[str, bytes]]
    """Path and content of each checkpoint."""
    member_weights: Sequence[str] = ()
    """For an ensemble, the SHA-256 digest of each member's weights when it was evaluated."""
    is_run: bool = False
    """Whether they stand for whole runs. With a validation split the best weights are then used."""

    @classmethod
    def of_run(cls, last: Path) -> Self:
        """Read the last checkpoint of a run, which stands for the run. Raises `CheckpointError`."""
        return cls(str(last), [(str(last), read_bytes(last))], is_run=True)


Members = tuple[CheckpointFiles, list[dict[str, Any]]]
"""The checkpoints of an ensemble's networks, and their results."""


def find_checkpoint(path: Path) -> CheckpointFiles:
    """Read the checkpoint at `path`. For a run's folder it is the last one, for an ensemble's its members'.

    Raises `CheckpointError` if there is none.
    """
    for folder in (path / "checkpoints", path):
        if checkpoints := checkpoints_in(folder) or original_checkpoints_in(folder):
            last = checkpoints[-1]
            return CheckpointFiles.of_run(last)
    if members := members_in(path):
        return _find_members(path, example=members[0])
    for best in (path / "checkpoints" / "best.pt", path / "best.pt", path / "model_best.pth.tar"):
        if best.is_file():
            raise CheckpointError(
                f"{path} does not have its last checkpoint: name another one, such as {best}"
            )
    if path.is_dir():
        raise CheckpointError(f"{path} has no checkpoint in it")
    return CheckpointFiles(str(path), [(str(path), read_bytes(path))])


def _find_members(path: Path, *, example: Path) -> CheckpointFiles:
    """Read the final checkpoints of the members that the ensemble's `result.json` lists.

    Raises `CheckpointError` for an unfinished ensemble, with the member's folder `example` as a suggestion.
    """
    ensemble = read_ensemble_result(path)
    members = ensemble["members"] if ensemble else []
    found = read_members(path, [member["seed"] for member in members])
    if not members or found is None:
        raise CheckpointError(
            f"{path} is an unfinished ensemble: name one of its networks, such as {example}"
        )
    return dataclasses.replace(found[0], member_weights=[member["weights_sha256"] for member in members])


def read_members(path: Path, seeds: Sequence[int]) -> Members | None:
    """Read the final checkpoints of the members with these seeds; None if one of them is unfinished.

    Raises `CheckpointError` for a damaged file.
    """
    folders = [member_folder(path, seed) for seed in seeds]
    results = [result for folder in folders if (result := read_result(folder)) is not None]
    if len(results) < len(folders):
        return None
    files = [
        checkpoint_path(folder / "checkpoints", result["steps"])
        for folder, result in zip(folders, results, strict=True)
    ]
    weights = [result["weights_sha256"] for result in results]
    contents = [(str(file), read_bytes(file)) for file in files]
    return CheckpointFiles(str(path), contents, weights, is_run=True), results


def restore(checkpoint: CheckpointFiles, *, model: str | None, device: torch.device) -> Trained:
    """Load the network in a checkpoint, or the combined network of an ensemble.

    A checkpoint of a user's own model names code. It is imported only if `model` names the same code,
    because a file from a stranger must not choose what is imported. Raises `CheckpointError` if `model`
    differs, for a damaged file, and for an ensemble whose members have changed since it was evaluated.
    """
    members = [
        _restore_one(path, raw, model, device, best=checkpoint.is_run) for path, raw in checkpoint.files
    ]
    if len(members) == 1:
        return members[0]
    for member, expected in zip(members, checkpoint.member_weights, strict=True):
        if member.weights_sha256 != expected:
            raise CheckpointError(
                f"{member.path} has different weights from when {checkpoint.path} was evaluated: resume "
                "the ensemble with --resume auto to evaluate it again"
            )
    vote = Vote([member.network for member in members]).eval()
    return dataclasses.replace(members[0], network=vote, path=checkpoint.path, best_step=None)


def _restore_one(path: str, raw: bytes, model: str | None, device: torch.device, *, best: bool) -> Trained:
    """Load one network from a checkpoint's content `raw`; `path` is for errors.

    With `best`, and with a validation split, it gets the weights with the best validation accuracy so far.
    """
    content = decode(raw, path)
    try:
        recipe = Recipe.from_dict(content["recipe"], path) if content["recipe"] else Recipe(model="linear")
    except UsageError as error:
        raise CheckpointError(f"{error}: a different version of dmnist wrote it") from None
    if recipe.model not in MODELS and recipe.model != model:
        raise CheckpointError(
            f"{path} uses the model {recipe.model}, which is code outside this program: "
            f"if you trust it, add --model {recipe.model}"
        )
    dataset = content["dataset"] or _ORIGINAL_DATASET
    class_names = tuple(dataset["class_names"])
    channels, height, width = dataset["image_shape"]
    shape = channels, height, width
    best_weights = content["best_weights"] if best else None
    weights = best_weights or content["model"]
    if recipe.model in MODELS:
        with torch.device("meta"):  # without memory, because a damaged shape could fill it
            require_weights(MODELS[recipe.model](len(class_names), shape), weights, path)
    network = build(recipe.model, len(class_names), recipe.seed, shape, recipe.precision == "exact")
    load_weights(network, weights, path)
    network = place(network, device, shape).eval()
    return Trained(
        network=network,
        recipe=recipe,
        class_names=class_names,
        mean=dataset["mean"],
        std=dataset["std"],
        dataset=dataset["name"],
        content=content,
        path=path,
        image_shape=shape,
        best_step=content["best_step"] if best_weights else None,
    )
