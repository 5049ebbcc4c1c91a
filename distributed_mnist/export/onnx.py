"""Export to ONNX: one file with the weights inside, for onnxruntime in any language and for browsers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inference.trained import Trained
from .inference_module import InferenceModule, Metadata, quiet

OPSET = 18
"""The oldest that torch's exporter writes natively. Runtimes since 2023 (onnxruntime 1.14) read it."""
_IR_VERSION = 8  # as old as OPSET; torch writes the newest version, which older runtimes reject


def encode(module: InferenceModule, metadata: Metadata) -> bytes:
    """The file's bytes, identical for identical networks. Raises torch's errors."""
    import onnx  # noqa: PLC0415 - an optional dependency

    with quiet():
        program = torch.onnx.export(
            module.graph,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # always true with dynamo
    model = program.model_proto
    _remove_exporter_notes(model)
    model.ir_version, model.producer_name, model.producer_version = _IR_VERSION, "dmnist", ""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString(deterministic=True)


def decode(data: bytes, trained: Trained) -> tuple[Callable[[Tensor], Tensor], Metadata]:
    """The file as a function that runs in onnxruntime, and its metadata.

    Raises `onnx`'s errors for a bad file.
    """
    import onnx  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    onnx.checker.check_model(data, full_check=True)
    options = onnxruntime.SessionOptions()
    # More threads would be pinned to cores, which fails with warnings in containers.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run, dict(session.get_modelmeta().custom_metadata_map)


def _remove_exporter_notes(model: Any) -> None:
    """Remove the exporter's notes, such as names of its classes and paths of this machine.

    They would also make the file's bytes vary: names of dynamic sizes differ from process to process.
    """
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
