"""Exports as ONNX: one file, weights inside, for onnxruntime in any language and for browsers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inference.trained import Trained
from .inference_module import About, Exported, graph, quiet

OPSET = 18
"""The oldest that torch's exporter writes natively: runtimes from 2023 on read it (onnxruntime 1.14)."""
_IR_VERSION = 8  # of that time; torch writes the newest, which older runtimes refuse


def encode(exported: Exported, about: About) -> bytes:
    """The file's bytes, the same for the same network. Raises what torch raises."""
    import onnx  # noqa: PLC0415 - an extra, not always there

    with quiet():
        program = torch.onnx.export(
            graph(exported),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # it is, with dynamo
    model = program.model_proto
    _strip(model)
    model.ir_version, model.producer_name, model.producer_version = _IR_VERSION, "dmnist", ""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.helper.set_model_props(model, about)
    return model.SerializeToString(deterministic=True)


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], About]:
    """What the file computes, by onnxruntime, and its metadata. Raises what `onnx` does for a bad file."""
    import onnx  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    onnx.checker.check_model(data, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more are pinned to cores, which containers refuse, with a complaint
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run, dict(session.get_modelmeta().custom_metadata_map)


def _strip(model: Any) -> None:
    """Takes out what the exporter notes of its own work: names of its classes, paths of this machine.

    The names of dynamic sizes among it change from process to process.
    """
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
