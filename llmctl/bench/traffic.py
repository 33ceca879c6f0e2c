"""What a step of decoding has to read from memory, in bytes: every weight that it multiplies by, and the cache."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from llmctl.model import hf
from llmctl.model.config import SLIDING, Config

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
ROWS = {  # operators that read single rows of tables: from which input on
    "Gather": 0,
    "GatherBlockQuantized": 0,
    "RotaryEmbedding": 1,  # its cosines and sines
    "GroupQueryAttention": 7,
}
ONCE = "unread"  # seq2seq_graph.py: what cross-attention has not read of the source, nothing after the first step
PAST = ("past_key_values.", "past.")


def of_model(config: Config, dtype: str, positions: float) -> float:
    """In torch, with each weight in `dtype`, behind so many positions."""
    read = 0
    for name, tensor in hf.build(config).state_dict().items():  # built without memory
        once = (
            name.startswith("encoder.") or ".cross_attn.k_" in name or ".cross_attn.v_" in name
        )  # a prompt, not a step
        table = "embed_" in name and not (config.tie_word_embeddings and "embed_tokens" in name)
        read += 0 if once or table else tensor.numel()
    return SIZES[dtype] * (read + cache(config, positions))


def of_graph(graph: Path, config: Config, positions: float) -> float:
    """In ONNX Runtime, by the graph itself: quantised weights with their scales."""
    model = onnx.load(str(graph), load_external_data=False)
    multiplied = {
        name
        for node in model.graph.node
        for place, name in enumerate(node.input)
        if place < ROWS.get(node.op_type, len(node.input)) and ONCE not in node.input
    }
    weights = sum(_size(tensor) for tensor in model.graph.initializer if tensor.name in multiplied)
    past = next((value for value in model.graph.input if value.name.startswith(PAST)), None)
    kind = past.type.tensor_type.elem_type if past is not None else onnx.TensorProto.FLOAT
    return weights + _width(kind) * cache(config, positions)


def _size(tensor: onnx.TensorProto) -> int:
    """The bytes of a tensor, wherever they lie."""
    length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
    return length or len(tensor.raw_data) or math.prod(tensor.dims) * _width(tensor.data_type)


def _width(kind: int) -> int:
    """Bytes of a value."""
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def cache(config: Config, positions: float) -> float:
    """Values that are remembered of so many positions: keys and values, or an LSTM's two states."""
    if config.kind == "recurrent":
        return 2 * config.num_hidden_layers * config.hidden_size
    seen = [positions] * (config.num_decoder_layers or config.num_hidden_layers)
    if config.sliding_window is not None and config.kind == "decoder":
        window = config.sliding_window
        seen = [min(at, window) if config.layer_type(i) == SLIDING else at for i, at in enumerate(seen)]
    return 2 * config.num_key_value_heads * config.head_dim * sum(seen)
