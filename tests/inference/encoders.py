"""Tiny sentence encoders as folders that transformers wrote: random weights, and a tokenizer that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.parity.families import BASES
from tests.text import kinds

CONTEXT = 160
TEXTS = [
    "A cat sleeps.",
    "",
    "你好，世界。",
    "def add(a, b): return a + b",
    "Words, words, words. " * 9,
    "a",
    "x " * 300,
]


def embedding_qwen() -> Any:
    """As Qwen3-Embedding has it: a token of its own ends each text, whose state is the text's vector."""
    from tokenizers import processors

    made = kinds.qwen2()
    end = ("<|im_end|>", made.convert_tokens_to_ids("<|im_end|>"))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <|im_end|>", "$A $B <|im_end|>", [end])
    return made


MADE: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (kinds.bert, "mean_tokens"),
    "roberta": (kinds.roberta, "cls_token"),
    "modernbert": (kinds.modernbert, "mean_tokens"),
    "qwen3": (embedding_qwen, "lasttoken"),
}


def write(folder: Path, name: str) -> tuple[Any, Any]:
    """Writes the folder; transformers' model and tokenizer, which are what is in it."""
    import transformers

    make, pooling = MADE[name]
    tokenizer = make()
    class_, options = BASES[name]
    kind = getattr(transformers, class_)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT + 4 * (name == "roberta")}
    torch.manual_seed(5)
    model = kind(kind.config_class(**options | sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return model, tokenizer


def expected(name: str, model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """transformers' vector of a text alone, (C,)."""
    ids = tokenizer(text, truncation=True, max_length=CONTEXT, return_tensors="pt", verbose=False)["input_ids"]
    with torch.no_grad():
        states = model(ids).last_hidden_state[0]
    pooling = MADE[name][1]
    state = states[0] if pooling == "cls_token" else states[-1] if pooling == "lasttoken" else states.mean(0)
    return torch.nn.functional.normalize(state, dim=0)
