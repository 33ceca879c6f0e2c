"""A model's shape: what config.json says as switches, and how `[model] depth` becomes one.

`Config` carries Hugging Face's names where they have one; `families/` translates each family's config.json. `derive`
fills in what the recipe left open and returns each rule it used as a sentence, so that nothing is chosen behind the
user's back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import RecipeError

if TYPE_CHECKING:
    from llmctl.recipe import ModelSection, TokenizerSection

Kind = Literal["decoder", "encoder", "encoder-decoder", "recurrent"]
Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "embedding",
]
Derived = Callable[[str, int, str], int]  # name, value, formula: notes how a value came about, and returns it
MOST_LAYERS = 1000  # a config.json that says more lies, and modules for all of them would fill the memory
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer types of transformers' `layer_types`


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a rotary base trained on short texts is stretched to longer ones; `rotary.py` has the formulas.

    "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); "dynamic" raises the base with
    the text's length (NTK-aware); "yarn" interpolates slow frequencies only and sharpens the scores (Peng et al. 2023,
    arXiv:2309.00071); "llama3" divides only the slow ones, with a smooth ramp between two wavelengths.
    """

    kind: str  # "linear", "dynamic", "yarn" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a model and the switches of its sublayers. The defaults are Llama's.

    Attributes:
        num_hidden_layers: of an encoder-decoder, the encoder's; `num_decoder_layers` counts the others.
        norm_place: "pre" norms what a sublayer reads (Llama), "post" the stream after it (BERT), "both" what it reads
            and what it gives (Gemma 3).
        norm_offset: Gemma stores its gains less one.
        skip_first_norm: the first layer's attention reads the embeddings as they are (ModernBERT).
        position_offset: rows of the position table before the first position (RoBERTa: the padding id and one more).
        rope_local_theta: the rotary base of sliding layers where they have their own.
        sliding_window: of a causal layer, how many positions each sees, its own included; of a bidirectional one, how
            far to either side.
        layer_types: FULL or SLIDING for each layer; empty where all are full.
        attention_scale: of the scores; None for 1 / sqrt(head_dim).
        logit_scale: of the states before the head (T5's tied head).
        head_transform: what a task's head does first: "pooler" a dense layer and tanh, "norm" a dense layer, the
            activation and a norm.
        pooling: how a sequence becomes one vector: "cls" (the first token), "mean" or "last".
        carried: keys of the original config.json that change nothing llmctl computes; they are written back.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    kind: Kind = "decoder"
    num_decoder_layers: int = 0
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_place: Literal["pre", "post", "both"] = "pre"
    norm_bias: bool = False
    norm_offset: bool = False
    embedding_norm: bool = False
    skip_first_norm: bool = False
    positions: Literal["rotary", "learned", "relative", "none"] = "rotary"
    position_offset: int = 0
    type_vocab_size: int = 0
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    hidden_act: str = "silu"
    gated: bool = True
    attention_bias: bool = False  # of the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    task: Task = "causal-lm"
    num_labels: int = 2
    problem_type: str | None = None
    head_transform: Literal["", "pooler", "norm"] = ""
    head_act: str = "gelu"
    head_bias: bool = True
    pooling: Literal["cls", "mean", "last"] = "mean"
    carried: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def longest(self) -> int:
        """Tokens that a text may have: RoBERTa's table begins with rows that stand for none."""
        return self.max_position_embeddings - self.position_offset

    @property
    def rotary_dim(self) -> int:
        """How many of a head's values are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    def layer_type(self, layer: int) -> str:
        return self.layer_types[layer] if self.layer_types else FULL

    @property
    def parameters(self) -> int:
        """The number of trainable values, tied embeddings counted once."""
        return _parameters(self)


@functools.lru_cache(maxsize=64)
def _parameters(config: Config) -> int:
    """Of a model that is built without memory; that takes milliseconds, and a training asks many times."""
    from llmctl.model.hf import build

    return sum(tensor.numel() for tensor in build(config).state_dict().values())


def likely_vocabulary(section: TokenizerSection) -> int:
    """Pieces that a tokenizer will have, before it is trained: a guess where the recipe does not say."""
    return {"char": 100, "byte": 320}.get(section.type, section.vocab_size)


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
    from llmctl.model.families import FAMILIES

    formulas: list[str] = []

    def derived(name: str, value: int, formula: str) -> int:
        formulas.append(f"{name} {value:,} = {formula}")
        return value

    if section.family not in FAMILIES:
        raise RecipeError(
            f"[model] family = {section.family!r} is not known", hint=f"choose one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[section.family]
    if family.kind == "recurrent":
        layers, width = _recurrent(section, derived)
        heads, kv_heads, head_dim, inner = 1, 1, width, width  # there are none; see `families/decoders.py`
    else:
        layers, width = _stack(section, derived)
        heads, kv_heads, head_dim = _heads(section, width, derived)
        if "head_dim" not in family.fields and heads * head_dim != width:
            raise RecipeError(
                f"[model] {heads} heads of {head_dim} are not hidden_size = {width}, as a {section.family} has them",
                hint="leave num_attention_heads or head_dim out",
            )
        inner = section.intermediate_size or (
            derived("intermediate_size", _up(8 * width, 3, 64), "8/3 x hidden_size, up to a multiple of 64")
            if family.switches.get("gated", True)
            else derived("intermediate_size", 4 * width, "4 x hidden_size")
        )
    if family.kind == "encoder-decoder":
        derived("num_decoder_layers", layers, "num_hidden_layers")
    # T5 scales a tied head down by sqrt(width), and learns slowly by it: 5.04 nats after 150 steps of
    # recipes/seq2seq.toml, 4.12 with a head of its own.
    tied = section.tie_word_embeddings if section.tie_word_embeddings is not None else family.kind != "encoder-decoder"
    shape = Config(
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
        norm_eps=section.rms_norm_eps or 1e-6,
        tie_word_embeddings=tied,
        dropout=section.dropout,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    tasks: dict[str, Task] = {"encoder": "masked-lm", "encoder-decoder": "seq2seq-lm"}
    task: Task = tasks.get(family.kind, "causal-lm")
    whole = {"kind": family.kind, "task": task, "head_transform": family.head.get(task, "")}
    config = dataclasses.replace(shape, **{**whole, **family.switches, **family.fresh(shape)})
    if problem := impossible(config):
        raise RecipeError(f"[model] {problem}")
    return config, formulas


def _stack(section: ModelSection, derived: Derived) -> tuple[int, int]:
    """Layers and width of a transformer."""
    depth = section.depth or section.num_hidden_layers or derived("depth", 4, "what is taken if nothing is said")
    layers = section.num_hidden_layers or derived("num_hidden_layers", depth, "depth")
    width = section.hidden_size or derived(
        "hidden_size", _up(128 * depth, 3, 64), "128 x depth / 3, up to a multiple of 64"
    )
    return layers, width


def _recurrent(section: ModelSection, derived: Derived) -> tuple[int, int]:
    """Layers and width of a stack of LSTMs with about the parameters of a transformer of that depth.

    A plain stack trains well up to 4 layers, barely with 6 and hardly past 8 (Wu et al. 2016, arXiv:1609.08144, section
    3.1), so a deeper one grows in width. A layer has 8 C^2 parameters, a transformer's 12.
    """
    depth = section.depth or section.num_hidden_layers or derived("depth", 4, "what is taken if nothing is said")
    layers = section.num_hidden_layers or derived("num_hidden_layers", min(depth, 4), "depth, at most 4")
    width = section.hidden_size or derived(
        "hidden_size",
        _up(round(_up(128 * depth, 3, 64) * math.sqrt(1.5 * depth / layers)), 1, 16),
        "a transformer's width x sqrt(12/8 x depth / num_hidden_layers), up to a multiple of 16",
    )
    return layers, width


def _heads(section: ModelSection, width: int, derived: Derived) -> tuple[int, int, int]:
    """Query heads, key and value heads, and their size."""
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
    return heads, kv_heads, head_dim


def impossible(config: Config) -> str:
    """Why no model can have this shape, naming the key; empty when one can."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window if config.sliding_window is not None else 1,
        "num_labels": config.num_labels,
        "num_decoder_layers": config.num_decoder_layers if config.kind == "encoder-decoder" else 1,
    }
    for name, value in sizes.items():
        if value < 1:
            return f"{name} = {value}, but it must be at least 1"
    if max(config.num_hidden_layers, config.num_decoder_layers) > MOST_LAYERS:
        return f"num_hidden_layers = {config.num_hidden_layers:,}; no model has more than {MOST_LAYERS:,}"
    if config.positions == "rotary" and config.kind != "recurrent" and (config.rotary_dim % 2 or config.rotary_dim < 2):
        return f"head_dim = {config.rotary_dim} is odd, but the rotary embedding turns pairs"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"num_key_value_heads = {config.num_key_value_heads} does not divide "
            f"num_attention_heads = {config.num_attention_heads}"
        )
    if config.layer_types and len(config.layer_types) != config.num_hidden_layers:
        return f"layer_types names {len(config.layer_types)} layers, num_hidden_layers = {config.num_hidden_layers}"
    if SLIDING in config.layer_types and config.sliding_window is None:
        return "layer_types asks for sliding layers, but sliding_window is not set"
    if config.positions == "learned" and config.max_position_embeddings <= config.position_offset:
        return f"max_position_embeddings = {config.max_position_embeddings} leaves no position"
    if not 0.0 <= config.dropout < 1.0:
        return f"dropout = {config.dropout}, but it must be at least 0 and below 1"
    if not all(math.isfinite(value) for value in (config.rope_theta, config.norm_eps, config.embedding_scale)):
        return "rope_theta, norm_eps or embedding_scale is no finite number"
    return ""


def _up(numerator: int, denominator: int, multiple: int) -> int:
    """`numerator / denominator`, rounded up to a multiple, in integers."""
    return -(-numerator // (denominator * multiple)) * multiple
