"""`dmnist export`: a checkpoint as a file that others run, read back and compared."""

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
from ..errors import OutputError, UsageError, VerificationError, reason
from ..inference.trained import Trained, find, restore
from ..inference.vote import Vote
from ..reporting.console import make_console, print_json
from . import onnx, pt2, safetensors
from .check import Difference, compare, require_same, test_images
from .inference_module import INPUT, MARK, About, Exported, about


@dataclass(frozen=True)
class _Format:
    suffix: str
    needs: tuple[str, ...]
    """Packages that are not among our own needs; the extra of ours with them has the format's name."""
    encode: Callable[[Exported, About], bytes]
    decode: Callable[[bytes, Trained], tuple[Callable[[Tensor], Tensor], About]]


_FORMATS = {
    "onnx": _Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), onnx.encode, onnx.decode),
    "safetensors": _Format(".safetensors", ("safetensors",), safetensors.encode, safetensors.decode),
    "torch": _Format(".pt2", (), pt2.encode, pt2.decode),
}


def run(
    *, checkpoint: Path, model: str | None, format: Sequence[str], out: Path | None, as_json: bool
) -> int:
    """Write a checkpoint in these formats; the exit code. Raises `DmnistError`s."""
    for name in format:
        _require_packages(name)
    trained = restore(find(checkpoint), model=model, device=torch.device("cpu"))
    if isinstance(trained.network, Vote) and "safetensors" in format:
        raise UsageError(
            "--format safetensors is of one network: name it, or export the vote as onnx or torch"
        )
    exported = Exported(trained.network, trained.mean, trained.std)
    told = about(trained)
    console = make_console(stderr=as_json)
    files = []
    for name in format:
        path = out or _default_path(checkpoint, _FORMATS[name].suffix)
        _require_ours(path)
        with console.status(Text(f"exporting to {path}")):
            files.append(_write(path, name, trained, exported, told))
        _show(console, files[-1])
    autocast = _autocast_difference(trained, exported)
    if autocast is not None:
        console.print(
            f"computes in fp32; trained with {trained.recipe.precision} autocast, whose logits differ by "
            f"up to {autocast:.1e}",
            soft_wrap=True,
        )
    console.print(f"takes {INPUT}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "checkpoint": trained.path,
                "weights_sha256": told["weights_sha256"],
                "input": INPUT,
                "autocast_difference": autocast,
                "files": files,
                "metadata": told,
            }
        )
    return 0


def _require_packages(name: str) -> None:
    missing = [package for package in _FORMATS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--format {name} needs {', '.join(missing)}: {install(name)}; "
            f"--format torch needs nothing more"
        )


def _default_path(checkpoint: Path, suffix: str) -> Path:
    """In the run's folder: `model` for its best checkpoint, for one that was named the name of that."""
    if checkpoint.is_dir():
        return checkpoint / f"model{suffix}"
    folder = checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return run / (checkpoint.name.split(".")[0] + suffix)


def _require_ours(path: Path) -> None:
    """Raises `OutputError` if something lies at `path` that is not an earlier export."""
    try:
        ours = MARK.encode() in path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}") from None
    if not ours:
        raise OutputError(f"{path} is there and no export of ours: name another with --out, or remove it")


def _write(path: Path, name: str, trained: Trained, exported: Exported, told: About) -> dict[str, Any]:
    """One file, which gets its name when it has been read back and compared; what `--json` tells of it."""
    form = _FORMATS[name]
    try:
        data = form.encode(exported, told)
    except Exception as error:  # a graph of code that may be anybody's: torch raises many types
        raise UsageError(
            f"the model {trained.recipe.model} cannot be exported to {name}: {_why(error)} "
            f"(--debug shows where)"
        ) from error
    try:
        with written_aside(path) as part:
            part.write_bytes(data)
            difference = _read_back(part.read_bytes(), form, trained, exported, told, str(path))
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


def _read_back(
    data: bytes, form: _Format, trained: Trained, exported: Exported, told: About, name: str
) -> Difference:
    """Raises `VerificationError` unless the file is what was to be written."""
    try:
        run, got = form.decode(data, trained)
    except Exception as error:  # each library has its own types for a bad file
        raise VerificationError(f"{name} was not kept: it cannot be read back: {_why(error)}") from error
    require_same(got, told, name)
    return compare(run, exported, name)


def _why(error: Exception) -> str:
    """The first sentence of what torch says, which goes on for a page."""
    text = " ".join(str(error).split())
    if "specialized it to be a constant" in text:
        return "it fixes the number of images; where it has len(x), x.shape[0] may do"
    return text.partition(". ")[0][:200] or type(error).__name__


@torch.no_grad()
def _autocast_difference(trained: Trained, exported: Exported) -> float | None:
    """How far the logits are from those of `dmnist evaluate`; None if that computes in fp32 too."""
    if trained.recipe.precision == "fp32":
        return None
    return max((trained.logits(images) - exported(images)).abs().max().item() for images in test_images())


def _show(console: Console, file: dict[str, Any]) -> None:
    line = Text.assemble(
        (file["path"], "bold"),
        f": {file['format']}, {file['bytes']:,} bytes, logits within {file['max_difference']:.1e} of "
        f"torch's on {file['compared_images']} drawn digits",
    )
    console.print(line, soft_wrap=True)
