"""`dmnist export`: write a checkpoint in another format, read it back and compare its outputs."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..common.atomic_write import written_aside
from ..common.installed import install
from ..errors import OutputError, UsageError, reason
from ..inference.trained import Trained, find_checkpoint, restore
from ..inference.vote import Vote
from ..models.running_statistics import statistics_layers
from ..reporting.console import make_console, print_json
from ..runs.layout import require_overwritable
from . import onnx, pt2, safetensors
from .check import compare_logits, not_kept, require_same_metadata, sample_images
from .inference_module import PRODUCER, InferenceModule, Metadata, make_metadata


@dataclass(frozen=True)
class _Format:
    suffix: str
    packages: tuple[str, ...]
    """Packages that this format needs in addition. The extra of the format's name installs them."""
    encode: Callable[[InferenceModule, Metadata], bytes]
    decode: Callable[[bytes, Trained], tuple[Callable[[Tensor], Tensor], Metadata]]


_FORMATS = {
    "onnx": _Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), onnx.encode, onnx.decode),
    "safetensors": _Format(".safetensors", ("safetensors",), safetensors.encode, safetensors.decode),
    "torch": _Format(".pt2", (), pt2.encode, pt2.decode),
}


def run(
    *, checkpoint: Path, model: str | None, format: Sequence[str], out: Path | None, as_json: bool
) -> int:
    """Export a checkpoint to each format. Returns the exit code. Raises subclasses of `DmnistError`."""
    for name in format:
        _require_packages(name)
    trained = restore(find_checkpoint(checkpoint), model=model, device=torch.device("cpu"))
    if isinstance(trained.network, Vote) and "safetensors" in format:
        raise UsageError(
            "--format safetensors holds one network, not an ensemble: name one of its networks, or use "
            "--format onnx or torch"
        )
    if layers := statistics_layers(trained.network):  # in evaluation, those without running statistics
        raise UsageError(
            f"--model {trained.recipe.model}: its layer {next(iter(layers))} keeps no running statistics "
            "(track_running_stats=False), so in an exported file one image's logits would depend on others"
        )
    module = InferenceModule(trained.network, trained.mean, trained.std, trained.image_shape)
    metadata = make_metadata(trained)
    console = make_console(stderr=as_json)
    files = []
    for name in format:
        path = out or _default_path(checkpoint, _FORMATS[name].suffix)
        require_overwritable(path, PRODUCER.encode(), "export")
        with console.status(Text(f"exporting to {path}")):
            files.append(_write(path, name, trained, module, metadata))
        _print_file(console, files[-1])
    autocast_difference = _autocast_difference(trained, module)
    if autocast_difference is not None:
        how = "in exact arithmetic" if trained.recipe.precision == "exact" else "with bf16 autocast"
        console.print(
            f"computes in fp32; trained {how}, whose logits differ by up to {autocast_difference:.1e}"
        )
    console.print(f"input {metadata['input']}")
    if as_json:
        print_json(
            {
                "checkpoint": trained.path,
                "weights_sha256": metadata["weights_sha256"],
                "input": metadata["input"],
                "autocast_difference": autocast_difference,
                "files": files,
                "metadata": metadata,
            }
        )
    return 0


def _require_packages(name: str) -> None:
    packages = _FORMATS[name].packages
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--format {name} needs {', '.join(missing)}: {install(name)}; "
            "--format torch needs no other packages"
        )


def _default_path(checkpoint: Path, suffix: str) -> Path:
    """The file to write in the run's folder: `model` for a folder, otherwise the checkpoint's name."""
    if checkpoint.is_dir():
        return checkpoint / f"model{suffix}"
    folder = checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return run / (checkpoint.name.split(".")[0] + suffix)


def _write(
    path: Path, name: str, trained: Trained, module: InferenceModule, metadata: Metadata
) -> dict[str, Any]:
    """Write one file, read it back and compare it, then give it its final name.

    Returns what `--json` prints about it.
    """
    format_ = _FORMATS[name]
    try:
        data = format_.encode(module, metadata)
    except Exception as error:  # the model may be any code, and torch raises many types of errors
        raise UsageError(
            f"the model {trained.recipe.model} cannot be exported to {name}: {_shorten(error)} "
            "(--debug shows where)"
        ) from error
    try:
        with written_aside(path) as part:
            part.write_bytes(data)
            written = part.read_bytes()
            try:
                run, read_metadata = format_.decode(written, trained)
            except Exception as error:  # each library raises its own types for a bad file
                raise not_kept(str(path), f"it cannot be read back: {_shorten(error)}") from error
            require_same_metadata(read_metadata, metadata, str(path))
            difference = compare_logits(run, module, str(path))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}") from None
    return {
        "path": str(path),
        "format": name,
        "bytes": len(data),
        "max_difference": difference.greatest,
        "allowed_difference": difference.allowed,
        "compared_images": difference.images,
    }


def _shorten(error: Exception) -> str:
    """The first sentence of an error message, since torch's messages can fill a screen."""
    text = " ".join(str(error).split())
    if "specialized it to be a constant" in text:
        return "it works for one batch size only; if it uses len(x), try x.shape[0]"
    return text.partition(". ")[0][:200] or type(error).__name__


@torch.no_grad()
def _autocast_difference(trained: Trained, module: InferenceModule) -> float | None:
    """The greatest difference from the logits of `dmnist evaluate`; None if that uses fp32 too."""
    if trained.recipe.precision == "fp32":
        return None
    return max(
        (trained.logits(images) - module(images)).abs().max().item()
        for images in sample_images(trained.image_shape)
    )


def _print_file(console: Console, file: dict[str, Any]) -> None:
    line = Text.assemble(
        (file["path"], "bold"),
        f": {file['format']}, {file['bytes']:,} bytes, logits within {file['max_difference']:.1e} of "
        f"torch's on {file['compared_images']} generated digits",
    )
    console.print(line)
