"""`dmnist export`: exported files are read with the same libraries that users read them with."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ranks import REPOSITORY, dmnist, environment, train
from safetensors import safe_open
from torch import nn
from warm import here

from distributed_mnist.common.digest import digest
from distributed_mnist.config import MNIST_SHAPE, Recipe
from distributed_mnist.data.generated import draw
from distributed_mnist.errors import OutputError, UsageError, VerificationError
from distributed_mnist.export import command
from distributed_mnist.export.check import BATCHES
from distributed_mnist.export.inference_module import InferenceModule, describe_input
from distributed_mnist.inference.trained import Trained, find_checkpoint, restore
from distributed_mnist.models.build import build
from distributed_mnist.models.zoo import MODELS
from distributed_mnist.runs.checkpoint import encode

FORMATS = ("onnx", "torch", "safetensors")
FILES = {"onnx": "model.onnx", "safetensors": "model.safetensors", "torch": "model.pt2"}
EXAMPLES = {
    content.partition("\n")[0].removeprefix("# with_").removesuffix(".py"): content
    for content in re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "docs" / "how-to" / "export.md").read_text(), re.M | re.S
    )
}


def save(folder: Path, model: str, *, classes: int = 10, precision: str = "fp32") -> Trained:
    """Make a run's folder with a network of random weights, as if it had been trained."""
    network = build(model, classes, seed=3)
    noise = torch.Generator().manual_seed(5)
    for parameter in network.parameters():  # some start at zero, where a wrong weight would not show
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    for buffer in network.buffers():  # running statistics
        buffer.add_(1)
    content: dict[str, Any] = {
        "format": 1,
        "model": network.state_dict(),
        "optimizer": {},
        "step": 1,
        "best_accuracy": 0.5,
        "samples_sha256": digest(0),
        "totals": {"loss": 0.0, "correct": 0.0, "images": 0.0},
        "train_seconds": 1.0,
        "recipe": dataclasses.asdict(Recipe(model=model, precision=precision)),  # type: ignore[arg-type]
        "dataset": {
            "name": "some",
            "class_names": [chr(ord("a") + i) for i in range(classes)],
            "mean": 0.25,
            "std": 0.4,
            "sha256": digest(1),
        },
        "steps_per_epoch": 1,
        "versions": {},
    }
    path = folder / "checkpoints" / "step_00000001.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(content))
    return restore(find_checkpoint(folder), model=model, device=torch.device("cpu"))


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images})
    assert isinstance(logits, np.ndarray)
    return logits


def metadata(path: Path) -> dict[str, str]:
    """A file's metadata, read with the format's own library."""
    if path.suffix == ".onnx":
        return dict(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return file.metadata()
    extra = dict.fromkeys(["class_names", "mean", "std", "input", "weights_sha256", "producer"], "")
    torch.export.load(path, extra_files=extra)
    return extra


def export(
    checkpoint: Path,
    *,
    model: str | None = None,
    format: Sequence[str] = ("onnx",),
    out: Path | None = None,
) -> int:
    """Run `dmnist export` in this process."""
    return command.run(checkpoint=checkpoint, model=model, format=format, out=out, as_json=False)


@dataclass(frozen=True)
class Exported:
    """A network in every format, exported in this process."""

    trained: Trained
    folder: Path
    said: str


@pytest.fixture(scope="module")
def every_format(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Export a model that is not trained and has 7 classes, once: `cnn-small` takes seconds."""

    @functools.cache
    def export_once(model: str) -> Exported:
        folder = tmp_path_factory.mktemp(model)
        trained = save(folder, model, classes=7)
        with (
            mock.patch.object(torch.export, "export", wraps=torch.export.export) as make_graph,
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            assert export(folder, format=FORMATS) == 0
        make_graph.assert_called_once()  # all formats share it
        return Exported(trained, folder, said.getvalue())

    return export_once


@pytest.mark.parametrize("model", MODELS)
def test_every_model_in_every_format(
    model: str, every_format: Callable[[str], Exported], capfd: pytest.CaptureFixture[str]
) -> None:
    exported = every_format(model)  # the first use of the fixture in this file, so all it says is seen here
    assert capfd.readouterr().err == ""
    assert describe_input(MNIST_SHAPE) in exported.said
    assert [line.partition(":")[0] for line in exported.said.splitlines()[:3]] == [
        str(exported.folder / FILES[name]) for name in FORMATS
    ]
    again = torch.export.load(exported.folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    for count in (1, 2, 5, 100):
        images = draw(count, "strangers")[0]
        wanted = exported.trained.logits(torch.from_numpy(images)).numpy()
        assert np.ptp(wanted) > 0.1
        (got,) = session.run(["logits"], {"images": images})
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1.0, abs(wanted).max()))
        assert torch.equal(again(torch.from_numpy(images)), torch.from_numpy(wanted))
    with safe_open(exported.folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    assert digest(weights) == digest(dict(exported.trained.network.state_dict()))
    for name in FORMATS:
        about = metadata(exported.folder / FILES[name])
        assert json.loads(about["class_names"]) == list("abcdefg")
        assert (float(about["mean"]), float(about["std"])) == (0.25, 0.4)
        assert about["weights_sha256"] == digest(weights)
        assert about["input"] == describe_input(MNIST_SHAPE)
        assert about["producer"].startswith("dmnist export ")


@pytest.mark.parametrize("model", MODELS)
def test_one_onnx_file_for_old_runtimes_without_a_trace_of_this_machine(
    model: str, every_format: Callable[[str], Exported]
) -> None:
    folder = every_format(model).folder
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", *sorted(FILES.values())]
    file = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(part.domain, part.version) for part in file.opset_import] == [("", 18)]
    assert file.ir_version == 8
    assert not any(tensor.external_data for tensor in file.graph.initializer)
    (images,), (logits,) = file.graph.input, file.graph.output
    dimensions = [(d.dim_param or d.dim_value) for d in images.type.tensor_type.shape.dim]
    assert (images.name, images.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert dimensions == ["n", 28, 28]
    assert [(d.dim_param or d.dim_value) for d in logits.type.tensor_type.shape.dim] == ["n", 7]
    data = (folder / "model.onnx").read_bytes()
    assert str(REPOSITORY).encode() not in data
    assert b"site-packages" not in data


@pytest.mark.parametrize(
    "model",
    ["cnn", pytest.param("cnn-small", marks=pytest.mark.soak)],  # its graph has ten times the nodes
)
def test_the_same_network_gives_the_same_file(
    model: str, every_format: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Also in another process, and after other exports in this process."""
    folder = every_format(model).folder
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    assert dmnist("export", tmp_path, "--format", *FORMATS).code == 0
    for name in FILES.values():
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
        assert str(REPOSITORY).encode() not in (folder / name).read_bytes()


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trained `cnn`, which docs/how-to/export.md defines for safetensors, with bf16 autocast; and what
    `dmnist export --json` printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ("--recipe", "fast", "--model", "cnn", "--precision", "bf16", "--epochs", 3)
    train(*words, "--dataset", "idx", "--data", digits, nproc=1, out=out)
    return out, here("export", out, "--json").json()


def test_what_a_run_tells(run: tuple[Path, dict[str, Any]]) -> None:
    out, output = run
    result = json.loads((out / "result.json").read_text())
    (file,) = output["files"]
    assert file["path"] == str(out / "model.onnx")
    assert file["bytes"] == (out / "model.onnx").stat().st_size
    assert 0 < file["max_difference"] <= file["allowed_difference"] < 1e-2
    assert file["compared_images"] == sum(BATCHES)
    assert file["max_difference"] < output["autocast_difference"] < 0.5
    about = metadata(out / "model.onnx")
    assert about == output["metadata"]
    assert about["weights_sha256"] == result["weights_sha256"] == output["weights_sha256"]
    assert float(about["test_accuracy"]) == result["test_accuracy"]
    assert json.loads(about["recipe"])["model"] == "cnn"
    said = here("export", out / "checkpoints" / "best.pt", "--format", "torch")
    assert said.code == 0
    assert said.stdout.startswith(f"{out / 'best.pt2'}: torch, ")
    assert "computes in fp32; trained with bf16 autocast" in said.stdout


def test_no_accuracy_of_other_weights(tmp_path: Path) -> None:
    save(tmp_path, "linear")
    (tmp_path / "result.json").write_text('{"weights_sha256": "of the last step", "test_accuracy": 0.9}')
    export(tmp_path, format=("safetensors",))
    assert "test_accuracy" not in metadata(tmp_path / "model.safetensors")


def test_the_original_scripts_checkpoint(tmp_path: Path) -> None:
    network = build("linear", 10, seed=1)
    content = {"epoch": 3, "state_dict": network.state_dict(), "best_acc": 91.0, "optimizer": {}}
    torch.save(content, tmp_path / "model_best.pth.tar")
    export(tmp_path / "model_best.pth.tar")
    about = metadata(tmp_path / "model_best.onnx")
    assert (about["mean"], about["std"], about["dataset"]) == ("0.1307", "0.3081", "mnist")
    assert "recipe" not in about
    images = draw(9, "original")[0]
    normal = (torch.from_numpy(images).unsqueeze(1) / 255 - 0.1307) / 0.3081
    wanted = network(normal).detach().numpy()
    np.testing.assert_allclose(onnx_logits(tmp_path / "model_best.onnx", images), wanted, atol=1e-4)


def test_an_own_model(tmp_path: Path) -> None:
    trained = save(tmp_path, "user_models:batch_norm")
    ended = here("export", tmp_path)
    assert ended.code == 4
    assert "add --model user_models:batch_norm" in ended.stderr
    export(tmp_path, model="user_models:batch_norm", format=FORMATS)
    images = draw(20, "own")[0]
    wanted = trained.logits(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(onnx_logits(tmp_path / "model.onnx", images), wanted, atol=1e-4)


def test_a_network_that_mixes_images_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "user_models:untracked")
    with pytest.raises(UsageError, match="its layer 1 keeps no running statistics"):
        export(tmp_path, model="user_models:untracked")


@pytest.mark.parametrize(("model", "why"), [("branches", "control flow|data-dependent|Dynamo|branching")])
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_model_that_is_no_graph(
    model: str, why: str, form: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, f"user_models:{model}")
    with pytest.raises(UsageError, match=why) as raised:
        export(tmp_path, model=f"user_models:{model}", format=(form,))
    assert str(raised.value).startswith(f"the model user_models:{model} cannot be exported to {form}: ")
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def falsify(monkeypatch: pytest.MonkeyPatch, form: str, change: Any) -> None:
    right = command._FORMATS[form]
    wrong = dataclasses.replace(right, encode=partial(change, right.encode))
    monkeypatch.setitem(command._FORMATS, form, wrong)


def wrong_weight(encode: Any, network: Any, metadata: Any) -> bytes:
    weight = next(network.parameters())
    weight.data[0] += 0.01
    try:
        return encode(network, metadata)
    finally:
        weight.data[0] -= 0.01


def wrong_mean(encode: Any, network: Any, metadata: Any) -> bytes:
    return encode(network, metadata | {"mean": "0.26"})


def torn(encode: Any, network: Any, metadata: Any) -> bytes:
    data = encode(network, metadata)
    return data[: len(data) // 2]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("change", "why"),
    [(wrong_weight, "differ|another class"), (wrong_mean, "metadata changed in mean"), (torn, "read back")],
)
def test_a_wrong_file_is_not_kept(
    form: Any, change: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "linear")
    falsify(monkeypatch, form, change)
    with pytest.raises(VerificationError, match=why) as raised:
        export(tmp_path, format=(form,))
    assert str(raised.value).startswith(str(tmp_path / FILES[form]))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_weights_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.flatten(1)) * float("nan")

    monkeypatch.setitem(MODELS, "linear", lambda classes, _: Broken(784, classes))
    save(tmp_path, "linear")
    with pytest.raises(VerificationError, match="not finite"):
        export(tmp_path, format=("torch",))


def test_only_an_earlier_export_is_written_over(tmp_path: Path) -> None:
    save(tmp_path, "linear")
    out = tmp_path / "mine.onnx"
    out.write_bytes(b"years of work")
    with pytest.raises(OutputError, match="is not an earlier export"):
        export(tmp_path, out=out)
    assert out.read_bytes() == b"years of work"
    out.unlink()
    for form in FORMATS:
        export(tmp_path, out=out, format=(form,))
    with pytest.raises(OutputError, match="is a directory"):
        export(tmp_path, out=tmp_path)
    with pytest.raises(OutputError, match="not a directory"):
        export(tmp_path, out=out / "within")


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_extra(form: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=rf"needs {package}: \S+ -m pip install 'distributed-mnist\[{form}\]'"
    ):
        export(tmp_path, format=(form,))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "export needs a CHECKPOINT or a run's folder"),
        (("run", "--format", "pickle"), "--format must be onnx, safetensors or torch, not 'pickle'"),
        (("run", "--format"), "--format"),
        (("run", "--format", "onnx", "onnx"), "--format must be given without repeats"),
        (("run", "--format", "onnx", "torch", "--out", "x"), "--out names one file"),
        (("nowhere",), "nowhere: no such file"),
    ],
)
def test_bad_command_lines(words: tuple[str, ...], why: str) -> None:
    ended = here("export", *words)
    assert ended.code in (2, 4)
    assert why in ended.stderr
    assert ended.stderr.count("\n") == 1


WITHOUT_US = """
import sys
sys.modules["distributed_mnist"] = None
for example in sys.argv[1:]:
    exec(example, {})
"""


def test_the_documents_examples_run_without_us(run: tuple[Path, dict[str, Any]]) -> None:
    """Each in a namespace of its own, in one fresh program."""
    out, _ = run
    export(out, format=("torch", "safetensors"))
    trained = restore(find_checkpoint(out), model=None, device=torch.device("cpu"))
    in_fp32 = InferenceModule(trained.network, trained.mean, trained.std, trained.image_shape)
    images = draw(40, "documents")[0]
    np.save(out / "images.npy", images)
    best = in_fp32(torch.from_numpy(images)).argmax(1)
    wanted = [trained.class_names[i] for i in best]
    assert len(set(wanted)) > 3
    assert set(EXAMPLES) == set(FORMATS)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *EXAMPLES.values()],
        cwd=out, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == wanted * len(EXAMPLES), done.stderr
