"""A model's shape: what config.json says, and how `[model] depth` becomes one.

`Config` carries Hugging Face's names; `hf.py` reads and writes them. `derive` fills in what the recipe left open and
returns each rule it used as a sentence, so that nothing is chosen behind the user's back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.errors import RecipeError

if TYPE_CHECKING:
    from llmctl.recipe import ModelSection


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family's block apart from the others'; config decides, names never do."""

    model_type: str
    architecture: str  # the class that transformers, vLLM and llama.cpp look up
    qk_norm: bool  # RMSNorm over each head's query and key, before the rotation


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", qk_norm=False),  # Touvron et al. 2023, arXiv:2302.13971
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),  # Qwen Team 2025, arXiv:2505.09388
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a rotary base trained on short texts is stretched to longer ones.

    "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); "llama3" divides only the slow
    ones, with a smooth ramp between the two wavelengths (transformers' `_compute_llama3_parameters`).
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a decoder, under Hugging Face's names."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def parameters(self) -> int:
        """The number of trainable values, tied embeddings counted once."""
        width, attention = self.hidden_size, self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        block = 2 * width * attention + 2 * width * key_value + 3 * width * self.intermediate_size + 2 * width
        block += 2 * self.head_dim * self.qk_norm + (attention + 2 * key_value + width) * self.attention_bias
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + width


def derive(
    section: ModelSection, vocab_size: int, *, bos: int | None = 1, eos: int | None = 2, pad: int | None = 3
) -> tuple[Config, list[str]]:
    """The shape that `[model]` describes, and each derived value with its formula, ready to print.

    Width and depth grow together, as in nanochat's one dial; the aspect ratio of 128/3 a layer lies within the wide
    plateau that Kaplan et al. 2020 (arXiv:2001.08361, section 3.1) found. SwiGLU's 8/3 keeps the parameters of a 4x
    feed-forward (Shazeer 2020, arXiv:2002.05202). `bos`, `eos` and `pad` default to the ids that llmctl's own
    vocabularies give them.

    Raises:
        RecipeError: naming the key that is missing or does not go with the others.
    """
    formulas: list[str] = []

    def derived(name: str, value: int, formula: str) -> int:
        formulas.append(f"{name} {value:,} = {formula}")
        return value

    if section.family not in FAMILIES:
        raise RecipeError(
            f"[model] family = {section.family!r} is not known", hint=f"choose one of {', '.join(FAMILIES)}"
        )
    depth = section.depth or section.num_hidden_layers or derived("depth", 4, "what is taken if nothing is said")
    layers = section.num_hidden_layers or derived("num_hidden_layers", depth, "depth")
    width = section.hidden_size or derived(
        "hidden_size", _up(128 * depth, 3, 64), "128 x depth / 3, up to a multiple of 64"
    )
    heads, head_dim = section.num_attention_heads or 0, section.head_dim or 0
    if heads and not head_dim:
        if width % heads:
            raise RecipeError(f"[model] num_attention_heads = {heads} does not divide hidden_size = {width}")
        head_dim = derived("head_dim", width // heads, "hidden_size / num_attention_heads")
    elif not head_dim:
        head_dim = derived("head_dim", 64 if width >= 128 else 32, "64 (32 below a width of 128)")
    if not heads:
        if width % head_dim:
            raise RecipeError(
                f"[model] head_dim = {head_dim} does not divide hidden_size = {width}",
                hint="set `num_attention_heads` too, or another head_dim",
            )
        heads = derived("num_attention_heads", width // head_dim, "hidden_size / head_dim")
    kv_heads = section.num_key_value_heads or derived("num_key_value_heads", heads, "num_attention_heads")
    inner = section.intermediate_size or derived(
        "intermediate_size", _up(8 * width, 3, 64), "8/3 x hidden_size, up to a multiple of 64"
    )
    config = Config(
        family=section.family,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=section.max_seq_length,
        rope_theta=section.rope_theta or 10_000.0,
        rms_norm_eps=section.rms_norm_eps or 1e-6,
        tie_word_embeddings=section.tie_word_embeddings is not False,
        dropout=section.dropout,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    if problem := impossible(config):
        raise RecipeError(f"[model] {problem}")
    return config, formulas


def impossible(config: Config) -> str:
    """Why no decoder can have this shape, naming the key; empty when one can."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
    }
    for name, value in sizes.items():
        if value < 1:
            return f"{name} = {value}, but it must be at least 1"
    if config.head_dim % 2:
        return f"head_dim = {config.head_dim} is odd, but the rotary embedding turns pairs"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"num_key_value_heads = {config.num_key_value_heads} does not divide "
            f"num_attention_heads = {config.num_attention_heads}"
        )
    if not 0.0 <= config.dropout < 1.0:
        return f"dropout = {config.dropout}, but it must be at least 0 and below 1"
    return ""


def _up(numerator: int, denominator: int, multiple: int) -> int:
    """`numerator / denominator`, rounded up to a multiple, in integers."""
    return -(-numerator // (denominator * multiple)) * multiple
