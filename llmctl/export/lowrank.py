"""LoRA kept apart: the base model's graph takes low-rank changes as inputs, and a file beside it holds one.

Each adapted projection has two inputs with PEFT's names, `...lora_A.weight` (in, r) and `...lora_B.weight` (r, out),
whose defaults have rank 0: left out, the graph is the base model. adapter.onnx_adapter holds both for every projection
in ONNX Runtime's format; `RunOptions.add_active_adapter` gives them to a plain session, and several such files can go
with one graph (https://onnxruntime.ai/docs/genai/tutorials/multilora.html).

B batch, T tokens, r rank
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnx import helper

from llmctl.errors import DataError, UsageError
from llmctl.export.weights import ELEMENTS, streamed
from llmctl.inference.onnx_runner import ADAPTER
from llmctl.model import storage
from llmctl.model.lora import PEFT_PREFIX

if TYPE_CHECKING:
    from llmctl.artifact import Artifact
    from llmctl.export.builder import Graph

STATE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(model: Artifact) -> Artifact:
    """The model that a finetuned one's adapter goes on.

    Raises:
        UsageError: the model has no adapter, or the model it was trained from is gone.
    """
    found = model.input("model")
    if not (model.path / "adapter" / STATE).is_file():
        raise UsageError(
            f'[export] adapter = "apart", but {model.path} has no adapter/',
            hint='[finetune] method = "lora" makes one; adapter = "merged" exports the model as it is',
        )
    if found is None:
        raise UsageError(f"the model that {model.path}'s adapter goes on is not here", hint='adapter = "merged"')
    return found


def modules(adapter: Path) -> tuple[str, ...]:
    """The projections that an adapter folder changes, by their native names."""
    names = storage.header(adapter / STATE)
    ends = ".lora_A.weight"
    return tuple(name.removeprefix(PEFT_PREFIX).removesuffix(ends) for name in names if name.endswith(ends))


def changed(g: Graph, x: str, y: str, layer: str, names: Sequence[str], *, out: str) -> str:
    """y (B, T, outs), a product of the projections `names` of x (B, T, in), with the change of each added."""
    changes = []
    for name in names:
        weight, (A, B) = g.tensors[f"{layer}.{name}.weight"], (f"{layer}.{name}.lora_{part}.weight" for part in "AB")
        outs, ins = weight.shape
        for part, empty, shape in ((A, (ins, 0), (ins, f"{name}_rank")), (B, (0, outs), (f"{name}_rank", outs))):
            g.initializers[part] = helper.make_tensor(part, g.form.type, empty, [])
            g.inputs.append(helper.make_tensor_value_info(part, g.form.type, shape))
        narrow = g.op("MatMul", x, A, out=f"{layer}.{name}.narrow")  # (B, T, r)
        changes.append(g.op("MatMul", narrow, B, out=f"{layer}.{name}.change"))
    whole = g.op("Concat", *changes, out=f"{out}.change", axis=-1) if len(changes) > 1 else changes[0]
    return g.op("Add", y, whole, out=out)


def write(adapter: Path, folder: Path, dtype: str) -> None:
    """Writes a PEFT folder as adapter.onnx_adapter into an exported one, alpha / r multiplied into B.

    Raises:
        DataError: an adapter of a kind that the graph does not compute.
    """
    said = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    for key in ("use_dora", "use_rslora", "modules_to_save", "fan_in_fan_out"):
        if said.get(key):
            raise DataError(f"{key} = {said[key]!r}, which the graph has no nodes for", file=adapter / CONFIG)
    scale, made = np.float32(said["lora_alpha"] / said["r"]), {}
    for name, tensor in storage.header(adapter / STATE).items():
        values = np.frombuffer(b"".join(streamed(tensor)), np.float32).reshape(tensor.shape).T
        kept = values * scale if ".lora_B." in name else values
        kept = np.ascontiguousarray(kept.astype(ELEMENTS[dtype]))
        made[name.removeprefix(PEFT_PREFIX)] = ort.OrtValue.ortvalue_from_numpy(kept)
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(made)
    file.export_adapter(str(folder / ADAPTER))
