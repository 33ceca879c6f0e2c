"""genai_config.json, beside the graph: what onnxruntime-genai needs to run the folder as it is.

Reference: https://onnxruntime.ai/docs/genai/reference/config.html. Give it ids: its own tokenizer splits runs of spaces
differently from llmctl's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl.export.builder import GRAPH
from llmctl.model.config import Config


def config(c: Config, generation: dict[str, Any]) -> dict[str, Any]:
    """The document for a decoder of shape `c`; its `generation` config says where a chat model ends its turns."""
    eos = generation.get("eos_token_id", c.eos_token_id)
    eos = [eos] if isinstance(eos, int) else list(eos or ())
    bos = generation.get("bos_token_id", c.bos_token_id)
    pad = generation.get("pad_token_id", c.pad_token_id)
    return {
        "model": {
            "type": "decoder",  # any family with a cache like this; "gpt2" would want another
            "vocab_size": c.vocab_size,
            "context_length": c.max_position_embeddings,
            **({"bos_token_id": bos} if bos is not None else {}),
            "eos_token_id": eos,
            "pad_token_id": next(id for id in (pad, *eos, 0) if id is not None),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "hidden_size": c.hidden_size,
                "head_size": c.head_dim,
                "num_attention_heads": c.num_attention_heads,
                "num_key_value_heads": c.num_key_value_heads,
                "num_hidden_layers": c.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": c.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def write(folder: Path, c: Config) -> None:
    """Writes genai_config.json into an exported folder that holds generation_config.json."""
    generation = folder / "generation_config.json"
    known = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    (folder / "genai_config.json").write_text(json.dumps(config(c, known), indent=2) + "\n", encoding="utf-8")
