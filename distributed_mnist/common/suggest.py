"""Suggest a known name in an error message about an unknown name."""

import difflib
from collections.abc import Iterable

_CALLED_HERE = {
    "amp": "precision",
    "arch": "model",
    "background": "detach",
    "batch": "batch-size",
    "benchmark": "bench",
    "bs": "batch-size",
    "check": "doctor",
    "checkpoint": "resume",
    "checkpoint-dir": "out",
    "ckpt": "resume",
    "cancel": "stop",
    "config": "recipe",
    "daemon": "detach",
    "cuda": "device",
    "data-dir": "data",
    "data-path": "data",
    "degrees": "rotate",
    "download": "fetch",
    "dropout": None,  # it is part of the model, and --out is not meant
    "eval": "evaluate",
    "fit": "train",
    "fp16": "precision",
    "gamma": "decay-factor",
    "gpu": "device",
    "gpus": "nproc",
    "infer": "predict",
    "iterations": "steps",
    "kill": "stop",
    "learning-rate": "lr",
    "load": "resume",
    "log-dir": "out",
    "lr-scheduler": "schedule",
    "max-epochs": "epochs",
    "max-steps": "steps",
    "mixed-precision": "precision",
    "network": "model",
    "np": "nproc",
    "nproc-per-node": "nproc",
    "num-epochs": "epochs",
    "num-gpus": "nproc",
    "num-processes": "nproc",
    "num-workers": None,  # of a DataLoader
    "output": "out",
    "output-dir": "out",
    "processes": "nproc",
    "random-seed": "seed",
    "root": "data",
    "run": "train",
    "save-dir": "out",
    "scheduler": "schedule",
    "test": "evaluate",
    "translate": "shift",
    "valid": "evaluate",
    "wd": "weight-decay",
    "workers": "nproc",
    "world-size": "nproc",
    "zoom": "scale",
}
"""What other programs call our flags and commands, and our names; None where nothing here is similar."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean NAME?` for the known name with the same meaning, or else the most similar one.

    The result is empty if there is none. Dashes, underscores and case make no difference.
    """
    plain = {_plain(each): each for each in known}
    word = _plain(name)
    if word in _CALLED_HERE:
        similar = [meant for meant in [_CALLED_HERE[word]] if meant in plain]
    else:
        similar = difflib.get_close_matches(word, list(plain), 1, cutoff=cutoff)
    return f"; did you mean {plain[similar[0]]}?" if similar else ""


def unknown(kind: str, name: str, known: Iterable[str], other: str = "") -> str:
    """Return the message that `name` does not exist, with a suggestion and the list of known names."""
    known = list(known)
    suggestion = did_you_mean(name, known) or ";"
    return f"there is no {kind} {name!r}{suggestion} there are {', '.join(known)}{other}"


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
