"""What was trained, ready to use: a checkpoint, a run's folder or an ensemble's, as a network with what
belongs to it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.digest import digest
from ..config import Recipe
from ..data.catalog import DIGITS, MNIST_CONSTANTS
from ..data.split import normalise
from ..errors import CheckpointError, UsageError
from ..models.zoo import MODELS, build, place
from ..runs.checkpoint import Content, decode, load_weights, read_bytes
from ..runs.layout import checkpoint_path, checkpoints_in, member_folder, members_in
from ..training.evaluate import forward
from .vote import Vote

_ORIGINALS: dict[str, Any] = {
    "name": "mnist",
    "class_names": DIGITS,
    "mean": MNIST_CONSTANTS[0],
    "std": MNIST_CONSTANTS[1],
}
"""The data set of the original script's checkpoints, which do not tell."""


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode, on its device."""

    network: nn.Module
    """Takes normalised images `(n, 1, 28, 28)`, gives logits `(n, classes)`."""
    recipe: Recipe
    class_names: tuple[str, ...]
    mean: float
    """Of the pixels (0 to 1) of the images it was trained on, and below their deviation."""
    std: float
    dataset: str
    """Name of the data set it was trained on."""
    content: Content = field(repr=False)
    """The checkpoint."""
    path: str
    """Where the checkpoint was read; of networks that vote, the ensemble's folder."""

    @property
    def weights_sha256(self) -> str:
        """As the run tells it: of networks that vote, of theirs."""
        digests = [digest(dict(one.state_dict())) for one in self._networks]
        return digest(digests) if isinstance(self.network, Vote) else digests[0]

    @property
    def folder(self) -> Path:
        """Of the run that the checkpoint lies in."""
        return Path(self.path) if isinstance(self.network, Vote) else Path(self.path).parent.parent

    @property
    def _networks(self) -> list[nn.Module]:
        return list(self.network.members) if isinstance(self.network, Vote) else [self.network]

    @torch.no_grad()
    def logits(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """float32 `(n, classes)` of images `(n, 28, 28)` uint8, white on black as MNIST's are."""
        device = next(self.network.parameters()).device
        normal = normalise(torch.as_tensor(images).to(device, copy=True), self.mean, self.std)
        return forward(self.network, normal, self.recipe.precision)

    def probabilities(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """What the network gives each class, `(n, classes)`; for `images` see `logits`."""
        return self.logits(images).softmax(1)

    def predict(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """int64 `(n,)`: the class of the highest logit; its name is in `class_names`."""
        return self.logits(images).argmax(1)


@dataclass(frozen=True)
class Found:
    """The files of a network, or of those that vote."""

    path: str
    """The checkpoint, or the ensemble's folder."""
    files: list[tuple[str, bytes]]
    """Each checkpoint's path and bytes."""
    weights: Sequence[str] = ()
    """Of networks that vote, the digests of their weights when they did."""


def find(path: Path) -> Found:
    """The checkpoint at `path`, or the best of the run's folder there, or the last ones of an ensemble's.

    Raises `CheckpointError` if there is none.
    """
    for best in (path / "checkpoints" / "best.pt", path / "best.pt", path / "model_best.pth.tar"):
        if best.is_file():
            return Found(str(best), [(str(best), read_bytes(best))])
    if members := members_in(path):
        return _voters(path, members[0])
    if steps := checkpoints_in(path / "checkpoints"):
        raise CheckpointError(
            f"{path} was not scored before it stopped: name a checkpoint, such as {steps[-1]}"
        )
    if path.is_dir():
        raise CheckpointError(f"{path} has no checkpoint in it")
    return Found(str(path), [(str(path), read_bytes(path))])


def _voters(path: Path, one: Path) -> Found:
    """The networks of an ensemble that its `result.json` is the vote of, as they were then."""
    try:
        members = json.loads((path / "result.json").read_text())["members"]
        folders = [member_folder(path, member["seed"]) for member in members]
        steps = [json.loads((folder / "result.json").read_text())["steps"] for folder in folders]
        weights = [member["weights_sha256"] for member in members]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is an unfinished ensemble: name one of its networks, such as {one}"
        ) from None
    files = [
        checkpoint_path(folder / "checkpoints", step) for folder, step in zip(folders, steps, strict=True)
    ]
    return Found(str(path), [(str(file), read_bytes(file)) for file in files], weights)


def restore(found: Found, *, model: str | None, device: torch.device) -> Trained:
    """The network in the files that were found, or the vote of several.

    A checkpoint of a user's own model names code, which is only run if `model` names the same: a stranger's
    file must not choose what is imported. Raises `CheckpointError` if it does not, or for a damaged file.
    """
    networks = [_restore(path, raw, model, device) for path, raw in found.files]
    if len(networks) == 1:
        return networks[0]
    for one, then in zip(networks, found.weights, strict=True):
        if one.weights_sha256 != then:
            raise CheckpointError(
                f"{one.path} has other weights than when {found.path} voted: let it vote again"
            )
    vote = Vote([one.network for one in networks]).eval()
    return dataclasses.replace(networks[0], network=vote, path=found.path)


def _restore(path: str, raw: bytes, model: str | None, device: torch.device) -> Trained:
    content = decode(raw, path)
    try:
        recipe = Recipe.from_dict(content["recipe"], path) if content["recipe"] else Recipe(model="linear")
    except UsageError as error:
        raise CheckpointError(f"{error}: another version of dmnist wrote it") from None
    if recipe.model not in MODELS and recipe.model != model:
        raise CheckpointError(
            f"{path} is of the model {recipe.model}, which is code outside this program: "
            f"if you trust it, add --model {recipe.model}"
        )
    told = content["dataset"] or _ORIGINALS
    names = tuple(told["class_names"])
    network = build(recipe.model, len(names), recipe.seed)
    load_weights(network, content["model"], path)
    network = place(network, device).eval()
    return Trained(network, recipe, names, told["mean"], told["std"], told["name"], content, path)
