"""A GGUF file as a Hugging Face model: its metadata as config.json, its tensors under Hugging Face's names, and back.

llama.cpp renames every tensor, interleaves the rows of Llama's query and key (its rotation turns neighbours, Hugging
Face's turns halves), stores Gemma's norms as 1 + w, and GPT-2's matrices transposed. A family is data: an entry of
`ARCHITECTURES`, read in both directions.

Sources: llama.cpp's convert_hf_to_gguf.py, transformers' modeling_gguf_pytorch_utils.py and `gguf`'s tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import gguf_file
from llmctl.model.gguf_config import FREQUENCIES, Metadata
from llmctl.model.gguf_file import PLAIN, GGUFFile
from llmctl.text import gguf_vocabulary

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp spells a family."""

    name: str  # general.architecture
    model_type: str
    class_name: str
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    layers: str = "model.layers"
    norm_offset: float = 0.0  # llama.cpp's norms are Hugging Face's plus this
    interleaved: bool = False  # rows of query and key
    transposed: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None for one that the family does not have."""
        stem, _, suffix = name.rpartition(".")
        if (block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) is not None:
            inner = self.block.get(block[2])
            return inner and f"{self.layers}.{block[1]}.{inner}.{suffix}"
        outer = self.top.get(stem)
        return outer and f"{outer}.{suffix}"

    def gguf_name(self, name: str) -> str | None:
        """llama.cpp's name of a tensor; None for one that the family does not have."""
        stem, _, suffix = name.rpartition(".")
        if (layer := re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)", stem)) is not None:
            inner = next((key for key, value in self.block.items() if value == layer[2]), None)
            return inner and f"blk.{layer[1]}.{inner}.{suffix}"
        outer = next((key for key, value in self.top.items() if value == stem), None)
        return outer and f"{outer}.{suffix}"

    def from_gguf(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The values as Hugging Face has them; `name` is llama.cpp's, `config` config.json's contents."""
        if self.interleaved and (heads := _heads(name, config)):
            return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return self._otherwise(name, tensor, -self.norm_offset)

    def to_gguf(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The values as llama.cpp has them; the inverse of `from_gguf`."""
        if self.interleaved and (heads := _heads(name, config)):
            return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return self._otherwise(name, tensor, self.norm_offset)

    def _otherwise(self, name: str, tensor: Tensor, offset: float) -> Tensor:
        if offset and name.endswith("norm.weight"):
            return tensor.float() + offset
        return tensor.t().contiguous() if name.endswith(self.transposed) else tensor


ARCHITECTURES = {
    made.name: made
    for made in (
        Architecture("llama", "llama", "LlamaForCausalLM", interleaved=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", block=_BLOCK | _HEAD_NORMS),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", block=_GEMMA, norm_offset=1.0),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", block=_GEMMA | _HEAD_NORMS, norm_offset=1.0),
        Architecture(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            top={
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            block={
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            layers="transformer.h",
            transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
        ),
    )
}


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds, in the terms of a Hugging Face folder. Tensors stay on disk until they are asked for."""

    path: Path
    config: dict[str, Any]  # config.json, as transformers would write it
    generation_config: dict[str, Any]  # generation_config.json
    file: GGUFFile
    architecture: Architecture
    name: str = ""  # general.name
    licence: str = ""  # general.license, an SPDX id

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor under Hugging Face's name; F32, F16 and BF16 keep their type, what is quantised becomes fp32."""
        for stored in self.file.tensors.values():
            if (name := self.architecture.hf_name(stored.name)) is not None:
                yield name, self.architecture.from_gguf(stored.name, stored.load(), self.config)

    def layout(self) -> dict[str, Tensor]:
        """What `tensors` will give, by name, without their values: on torch's meta device."""
        found = {}
        for stored in self.file.tensors.values():
            if (name := self.architecture.hf_name(stored.name)) is not None:
                empty = torch.empty(stored.shape, dtype=PLAIN.get(stored.type, torch.float32), device="meta")
                found[name] = self.architecture.from_gguf(stored.name, empty, self.config)
        return found

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json and, where the file has a template, chat_template.jinja.

        Raises:
            DataError: a kind of tokenizer that llmctl does not build, or one that contradicts itself.
        """
        return gguf_vocabulary.from_metadata(self.file.metadata, self.architecture.name, self.path)


def read(path: Path) -> GGUFModel:
    """Reads everything but the tensors, and checks that the metadata describes them.

    Raises:
        DataError: a file that is damaged or lies about itself, an architecture or a quantisation that llmctl does not
            read, each naming what was found.
    """
    file = gguf_file.read(path)
    architecture = _architecture(file)
    config = Metadata(file, architecture.name, architecture.model_type, architecture.class_name).config()
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config[name] is not None}
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")  # ends a turn of a conversation, where eos ends a text
    if isinstance(turn, int) and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return GGUFModel(
        file.path,
        config,
        ids,
        file,
        architecture,
        name=_text(file, "general.name"),
        licence=_text(file, "general.license"),
    )


def _architecture(file: GGUFFile) -> Architecture:
    """The family, after checking that every tensor is one that it has."""
    stated = file.metadata.get("general.architecture")
    known = ARCHITECTURES.get(stated) if isinstance(stated, str) else None
    likest = known or ARCHITECTURES["llama"]
    kinds = {re.sub(r"blk\.\d+\.", "blk.N.", name) for name in file.tensors if name != FREQUENCIES}
    foreign = sorted(name for name in kinds if likest.hf_name(name.replace(".N.", ".0.")) is None)
    more = f" and {len(foreign) - 6} more" if len(foreign) > 6 else ""
    listed = ", ".join(foreign[:6]) + more
    if known is None:
        beside = f"; beside a Llama's tensors it has {listed}" if listed else ""
        raise DataError(
            f"general.architecture is {stated!r}, which llmctl does not build{beside}",
            file=file.path,
            hint=f"llmctl reads {', '.join(ARCHITECTURES)}; for others import the model's Hugging Face folder",
        )
    if foreign:
        raise DataError(
            f"has tensors that a {known.name} model of llmctl does not have: {listed}",
            file=file.path,
            hint="a mixture of experts, a vision part or an adapter is not read",
        )
    if "token_embd.weight" not in file.tensors:
        hint = "it is a vocabulary without a model, or a part of a split model under another name"
        raise DataError("has no tensor token_embd.weight", file=file.path, hint=hint)
    return known


def _heads(name: str, config: Mapping[str, Any]) -> int:
    """How many heads the rows of a query or key make up; 0 for any other tensor."""
    kind = name.split(".")[-2]
    key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(kind)
    return int(config[key]) if key else 0


def _text(file: GGUFFile, key: str) -> str:
    value = file.metadata.get(key, "")
    return value if isinstance(value, str) else ""
