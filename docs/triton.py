"""Puts an exported ONNX folder into a model repository of NVIDIA's Triton Inference Server.

    python docs/triton.py runs/tiny/export/finetune/onnx-ort repository tiny
    tritonserver --model-repository=repository

Writes repository/tiny/config.pbtxt, for Triton's ONNX Runtime backend, and repository/tiny/1/ with the graph and its
weights. Names, types and dimensions are the graph's own; every dimension counts (max_batch_size is 0), since the cache
has its batch where the ids have theirs. https://github.com/triton-inference-server/onnxruntime_backend
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnx
from onnx import TensorProto

TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}  # Triton spells the others as ONNX does


def config(graph: Path, name: str) -> str:
    """The text of config.pbtxt. An input that has a default (`logits_to_keep`) is none to Triton."""
    model = onnx.load(str(graph), load_external_data=False).graph
    defaults = {tensor.name for tensor in model.initializer}
    inputs = [value for value in model.input if value.name not in defaults]
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    lines += [tensor("input", value) for value in inputs] + [tensor("output", value) for value in model.output]
    return "\n".join(lines) + "\n"


def tensor(kind: str, value: onnx.ValueInfoProto) -> str:
    """One input or output; -1 stands for a dimension that a request chooses."""
    stated = value.type.tensor_type
    dtype = TensorProto.DataType.Name(stated.elem_type)
    dims = ", ".join(str(dim.dim_value if dim.HasField("dim_value") else -1) for dim in stated.shape.dim)
    return f'{kind} {{ name: "{value.name}" data_type: TYPE_{TYPES.get(dtype, dtype)} dims: [ {dims} ] }}'


def place(export: Path, repository: Path, name: str) -> Path:
    """Copies an export into the repository and returns the model's folder."""
    folder = repository / name
    version = folder / "1"
    version.mkdir(parents=True)
    for file in export.glob("*.onnx*"):  # the graph, and its weights beside it
        shutil.copyfile(file, version / file.name)
    (folder / "config.pbtxt").write_text(config(export / "model.onnx", name))
    return folder


if __name__ == "__main__":
    print(place(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
